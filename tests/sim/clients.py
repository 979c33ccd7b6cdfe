"""What clients do: they ask, perhaps again with the answer that they got, and leave at any time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Protocol

from router.core.effects import Effect
from router.core.events import Ended, Event, Reason, Submitted
from tests.sim.books import Books, Request
from tests.sim.worker import ensure
from tests.sim.world import (
    NO_FAULTS,
    World,
    add_adapters,
    add_scores,
    ask_scores,
    draw_adapter,
    draw_prompt,
    draw_request,
    draw_tokens,
)


class Clockwork(Protocol):
    """The simulation, as far as clients need it."""

    rng: Random
    books: Books
    world: World
    seen: Counter[str]
    faults_on: bool

    def at(self, delay_ms: int, handler: Callable[..., None], *arguments: object) -> None:
        """Calls the handler after that time."""

    def happens(self, rate: float) -> bool:
        """Whether a fault of this rate happens now."""

    def observe(self, event: Event) -> list[Effect]:
        """Lets the core observe an event."""

    def perform(self, effects: list[Effect]) -> None:
        """Performs what the core asked for."""


class Clients:
    """All of them; ``count`` is how many requests they have sent."""

    def __init__(self, sim: Clockwork, seed: int) -> None:
        """Gives the world what they may ask for beyond tokens."""
        self._sim = sim
        self.count = 0
        # Numbers of their own: worlds in which nobody asks for an adapter do not depend on them.
        self._adapter_rng = Random(f"adapters {seed}")
        add_adapters(self._adapter_rng, sim.world)
        self._scores_rng = Random(f"scores {seed}")
        add_scores(self._scores_rng, sim.world)

    def submit(self, former: Request | None) -> None:
        """A client asks for something, perhaps with what a ``former`` request has brought."""
        books, seen = self._sim.books, self._sim.seen
        facts, model = self._draw_request(former)
        full = len(books.open) >= self._sim.world.config.requests_max
        request = books.submitted(facts, model)
        hopeless, waits = books.hopeless(request), books.waits_aside(request)
        crowded = waits and books.crowded_aside()
        refused = full or hopeless or crowded
        effects = self._sim.observe(facts)
        ensure(len(effects) == refused, f"{facts.request} is taken or refused wrongly")
        self._sim.perform(effects)
        if waits and not refused:
            books.aside.add(request.id)
            seen["waits for who is away"] += 1
        seen["crowded aside"] += crowded and not (full or hopeless)
        self._plan_ends(request)
        seen["priority"] += facts.priority > 0
        seen["two models"] += model > 0
        seen["needs"] += bool(facts.needs)
        seen["adapter"] += bool(facts.adapter)
        seen["strange adapter"] += hopeless and not any(
            group.has_adapter(request) for group in books.serving(model)
        )

    def _draw_request(self, former: Request | None) -> tuple[Submitted, int]:
        sim, rng, world = self._sim, self._sim.rng, self._sim.world
        self.count += 1
        rates = world.faults if sim.faults_on else NO_FAULTS
        if former is None:
            model = rng.randrange(world.models)
            prompt = draw_prompt(rng, world)
        else:
            sim.seen["follow-up"] += 1
            model = former.model
            prompt = (*former.facts.prompt, *former.tokens, *draw_tokens(rng, 2))
        ask = draw_request(rng, world, rates, sim.books.now)
        before = None if former is None else former.facts.adapter
        adapter = draw_adapter(self._adapter_rng, world, rates, before)
        ask = replace(ask, request=self.count, prompt=prompt, adapter=adapter)
        return ask_scores(self._scores_rng, world, replace(ask, model=f"m{model}")), model

    def _plan_ends(self, request: Request) -> None:
        sim, faults = self._sim, self._sim.world.faults
        if sim.happens(faults.cancel_per_request):
            delay = sim.rng.choice((0, 3, 20, 100, 300))
            sim.at(sim.rng.randint(0, delay), self.end, request, Reason.CANCELLED)
        if sim.happens(faults.stop_string_per_request):
            request.stop_after = sim.rng.randint(1, 6)

    def end(self, request: Request, reason: Reason) -> None:
        """A client leaves, or has seen what it was waiting for."""
        if request.open:
            self._sim.books.due[request.id] = reason
        self._sim.perform(self._sim.observe(Ended(request.id, reason)))
