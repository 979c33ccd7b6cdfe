"""Answers that have begun and have no group to go on in: how long the core waits for one."""

from dataclasses import replace
from random import Random

from router.core.events import PROMPT_LOGPROBS
from router.core.scheduler import Core
from tests.sim.books import Books, Request
from tests.sim.worker import ensure
from tests.sim.world import FEATURES, World


def add_patience(rng: Random, world: World) -> None:
    """Lets some worlds wait for less time than groups are away, or keeps groups away for longer.

    And draws what counts as progress between two losses.
    """
    patience_ms = rng.choice((1, 4, 15, 60, 10_000, 10_000))
    world.config = replace(world.config, resume_timeout_ms=patience_ms)
    world.down_ms_max *= rng.choice((1, 1, 1, 8))
    progress = rng.choice((1, 2, 4, 16))
    world.config = replace(world.config, progress_tokens_min=progress)
    if rng.random() < 0.2:
        _make_uneven(rng, world)


def _make_uneven(rng: Random, world: World) -> None:
    """Lets the first group alone do what many need, and be away often."""
    world.uneven = True
    if len(world.groups) <= world.models:
        world.groups.append(replace(world.groups[0], name=f"g{len(world.groups)}"))
    for spec in world.groups:
        spec.features = ()
    world.groups[0].features = (*FEATURES, PROMPT_LOGPROBS)
    world.faults.needs_per_request = 0.4
    world.faults.crash_per_group = 3.2
    world.faults.deadline_per_request *= 0.3
    world.down_ms_max = rng.choice((60, 300))
    world.spread_ms = rng.choice((120, 300))
    world.requests, world.answer_max = 40, 24
    limits = {"requests_max": rng.choice((4, 8, 16)), "attempts_max": 3}
    world.config = replace(world.config, resume_streams=True, **limits)


def note_stranded(books: Books, core: Core) -> None:
    """After a turn: who waits now, and since when."""
    former, books.stranded, books.aside = books.stranded, {}, set()
    for number, request in books.open.items():
        line = core._lines[core._live[number].facts.model]
        groups, aside = books.serving(request.model), set_aside(core, request)
        if aside:
            books.aside.add(number)
            hope = request.tokens or not books.hopeless(request)
            waits = books.waits_aside(request) or not groups
            ensure(hope and waits, f"{number} waits for nothing")
            books.seen["set aside"] += number not in former and bool(request.tokens)
            books.seen["set aside without a token"] += not request.tokens
        if number in line and request.tokens and (aside or not groups):
            books.seen["stranded"] += number not in former
            books.stranded[number] = former.get(number, books.now)


def set_aside(core: Core, request: Request) -> bool:
    """Whether it waits where it holds up nobody."""
    return request.id in core._lines[request.facts.model].aside
