"""A real driver and fleet around a core that does as the test says."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from router.config import GroupSpec, Settings
from router.core.effects import Close, Deliver, Effect
from router.core.events import Ended, Event, Limits, Reason, Submitted
from router.core.snapshot import Snapshot
from router.driver import Driver
from router.fleet import Fleet, GroupCard
from router.metrics import Metrics
from router.service import Service
from router.text.tokenizer import Tokenizer

FEATURES = ("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p")


@dataclass(frozen=True)
class Said:
    """Not an event of the real core: what this one is to ask for."""

    effects: list[Effect]
    seen: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class ScriptedCore:
    """Notes what it hears and asks for what it is told."""

    submitted: list[Submitted] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def observe(self, now_ms: int, event: Event | Said) -> list[Effect]:
        match event:
            case Submitted():
                self.submitted.append(event)
                self.arrived.set()
            case Ended():
                self.ended.append(event)
            case Said():
                event.seen.set()
                return event.effects
        return []

    def plan(self, now_ms: int) -> list[Effect]:
        return []

    def wake_at(self) -> int | None:
        return None

    def snapshot(self) -> Snapshot:
        raise NotImplementedError


@dataclass
class House:
    """A service with everything around it that it needs."""

    service: Service
    driver: Driver
    fleet: Fleet
    core: ScriptedCore

    def say(
        self,
        request: int,
        tokens: Sequence[int] = (),
        close: Reason | None = None,
        *,
        logprobs: Sequence[object] = (),
        detail: str = "",
        prompt: Sequence[object] = (),
    ) -> None:
        """Tokens of a request and perhaps its end, all in one turn of the driver."""
        effects: list[Effect] = []
        if tokens or prompt:
            prompts = [(request, prompt)] if prompt else []
            effects.append(Deliver([request] * len(tokens), list(tokens), list(logprobs), prompts))
        if close is not None:
            effects.append(Close(request, close, detail))
        self.driver.post(Said(effects))

    async def settle(self) -> None:
        """Waits until the driver has seen everything that has been posted."""
        seen = asyncio.Event()
        self.driver.post(Said([], seen))
        await seen.wait()

    async def submission(self) -> None:
        """Waits until the core has been handed a request."""
        await self.core.arrived.wait()


def group_card(tokenizer: Tokenizer, eos: tuple[int, ...], **changes: object) -> GroupCard:
    fields: dict[str, object] = {
        "name": "g0",
        "model": "small",
        "engine": "scripted",
        "engine_version": "1",
        "device": "cpu",
        "dtype": "none",
        "scheduling": "caller",
        "world": 1,
        "limits": Limits(4096, 1, 8, 512, 200, shares_prefix=True),
        "features": FEATURES,
        "eos_token_ids": eos,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": "0",
        "instances": ("i",),
    }
    return GroupCard(**(fields | changes))  # type: ignore[arg-type]


@asynccontextmanager
async def house(
    tokenizer: Tokenizer,
    eos: tuple[int, ...],
    *,
    settings: Settings | None = None,
    clock_ms: int = 1_000_000,
    **card: object,
) -> AsyncIterator[House]:
    settings = settings or Settings()
    core = ScriptedCore()
    driver = Driver(core, Metrics(), settings.max_concurrent_requests, lambda: clock_ms)
    fleet = Fleet(settings, [GroupSpec("g0", "small", ("unix:///nowhere",))])
    fleet.up(group_card(tokenizer, eos, **card), tokenizer)
    running = asyncio.create_task(driver.run())
    try:
        yield House(Service(fleet, driver, settings), driver, fleet, core)
    finally:
        driver.stop()
        await running
