"""Whoever fits gets a turn, however many come behind."""

from dataclasses import replace

import pytest

from router.core.effects import Effect
from router.core.events import Reason, StepDone
from router.core.state import CoreConfig
from tests.core.bench import WIDE, Bench, endings_of
from tests.sim.worker import Worker

STEP_MS = 10
CONFIG = CoreConfig(share_tokens_min=2, reserve_tokens=4, head_start_ms=100, requests_max=10_000)
SMALL = replace(WIDE, kv_tokens=60, sequences_max=8, step_tokens_max=16)
LONG = 1


class Stream:
    """A group that is never idle: more comes with every step than it can do."""

    def __init__(self, config: CoreConfig) -> None:
        self.bench = Bench(config)
        self.bench.up(SMALL)
        self.worker = Worker(1, SMALL, SMALL.kv_tokens, 1, (), late=False)
        self.comes = LONG + 1

    def step(self, priority: int) -> list[Effect]:
        """One step, with what comes meanwhile."""
        bench = self.bench
        for _ in range(8):
            bench.submit(self.comes, (self.comes, 2, 3), max_tokens=4, priority=priority)
            self.comes += 1
        before = len(bench.plans)
        effects = bench.tick(bench.now + STEP_MS)
        for plan in bench.plans[before:]:
            drawn = self.worker.apply(plan, lambda: False)
            effects += bench.observe(
                StepDone(plan.group, plan.epoch, plan.plan_id, drawn.sequences, drawn.tokens)
            )
        return effects


@pytest.mark.parametrize("urgent", [0, 1])
@pytest.mark.parametrize("prompt_len", [3, 40, 55])
def test_one_that_needs_nearly_all_memory_has_it_in_time(urgent: int, prompt_len: int) -> None:
    """Smaller ones would fit beside what runs all the time, and more urgent ones never stop."""
    stream = Stream(CONFIG)
    for _ in range(20):
        stream.step(urgent)
    stream.bench.submit(LONG, tuple(range(100, 100 + prompt_len)), max_tokens=5, priority=3)
    ends: dict[int, Reason] = {}
    for _ in range(300):
        ends |= endings_of(stream.step(urgent))
    assert ends[LONG] is Reason.LENGTH
    assert stream.bench.core.snapshot().waiting > 100  # there was never room for all
