"""The router's own core drives an engine that schedules itself, plan by plan, two in flight.

What the core demands (one token for each sequence that is due, and no other) is checked by the core
itself: it abandons a group that does not answer truthfully.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from router.core.effects import Abandon, Close, Deliver, Effect, RunPlan
from router.core.events import Ended, GroupUp, Limits, Reason, StepDone, Submitted
from router.core.scheduler import Core
from router.core.state import CoreConfig
from shards.engines import load as load_engine
from shards.engines.base import Admit, Engine, EngineOptions, Plan, SamplingParams
from tests.engines.signatures import fake_sglang
from tests.engines.signatures.strict import installed
from tests.engines.signatures.toy import ToyEngine, logits
from tests.heavy.models import tiny_llama_folder

STEPS_MAX = 20_000


@pytest.fixture(autouse=True)
def package() -> Iterator[None]:
    fake_sglang.Engine.made.clear()
    with installed(sglang=fake_sglang.module()):
        yield


def make(kv_tokens: int, lease_tokens: int) -> Engine:
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        kv_tokens=kv_tokens,
        sequences_max=6,
        step_tokens_max=40,
        extra=(("lease_tokens", str(lease_tokens)),),
    )
    return load_engine("sglang", options, lambda _fraction: None)


def toy() -> ToyEngine:
    return fake_sglang.Engine.made[-1].toy


@dataclass
class Run:
    """One core and one engine, and what came of the requests."""

    engine: Engine
    core: Core
    plans: deque[RunPlan] = field(default_factory=deque)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    closed: dict[int, Close] = field(default_factory=dict)
    deepest: int = 0

    def begin(self) -> None:
        info = self.engine.describe()
        limits = Limits(
            kv_tokens=info.kv_tokens,
            page_tokens=info.page_tokens,
            sequences_max=info.sequences_max,
            step_tokens_max=info.step_tokens_max,
            length_max=info.length_max,
            shares_prefix="prefix_sharing" in info.features,
        )
        self._take(self.core.observe(0, GroupUp("g", 1, "m", "sglang", limits, info.features)))

    def submit(self, request: Submitted) -> None:
        self.tokens[request.request] = []
        self._take(self.core.observe(0, request))

    def cancel(self, request: int) -> None:
        self._take(self.core.observe(0, Ended(request, Reason.CANCELLED)))

    def step(self) -> bool:
        """Sends what can be sent, and answers the oldest plan; says whether there was one."""
        self._take(self.core.plan(0))
        self.deepest = max(self.deepest, len(self.plans))
        if not self.plans:
            return False
        plan = self.plans.popleft()
        outcome = self.engine.step(
            Plan(
                plan.drops,
                [
                    Admit(one.sequence, one.tokens, one.prompt_len, one.sampling)
                    for one in plan.admits
                ],
                list(zip(plan.work_sequences, plan.work_tokens, strict=True)),
            )
        )
        done = StepDone(
            *("g", 1, plan.plan_id, outcome.sequences, outcome.tokens),
            failures=tuple(outcome.failures.items()),
        )
        self._take(self.core.observe(0, done))
        return True

    def _take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case RunPlan():
                    self.plans.append(effect)
                case Deliver():
                    for request, token in zip(effect.requests, effect.tokens, strict=True):
                        self.tokens[request].append(token)
                case Close():
                    self.closed[effect.request] = effect
                case Abandon():
                    raise AssertionError(f"the core gave the group up: {effect.detail}")


def expected(request: Submitted) -> list[int]:
    """What greedy decoding of the toy model gives."""
    known, made = list(request.prompt), []
    while len(made) < request.max_tokens:
        made.append(int(logits(known).argmax()))
        known.append(made[-1])
        if made[-1] in request.stop_tokens:
            break
    return made


def requests(seed: int) -> list[Submitted]:
    chance = random.Random(seed)
    made = []
    for number in range(1, 17):
        prompt = tuple(chance.randrange(250) for _ in range(chance.randint(1, 90)))
        stops = frozenset(chance.sample(range(288), 6 * chance.randint(0, 1)))
        made.append(
            Submitted(
                request=number,
                model="m",
                prompt=prompt,
                max_tokens=chance.randint(1, 150),
                stop_tokens=stops,
                sampling=SamplingParams(stop_tokens=tuple(sorted(stops))),
            )
        )
    return made


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("lease_tokens", [3, 64])
def test_every_request_gets_its_tokens(seed: int, lease_tokens: int) -> None:
    """Memory is scarce, so sequences are preempted and come back with the tokens that they had."""
    engine = make(kv_tokens=640, lease_tokens=lease_tokens)
    run = Run(engine, Core(CoreConfig(reserve_tokens=16)))
    run.begin()
    asked = requests(seed)
    waiting = deque(asked)
    for _ in range(STEPS_MAX):
        while waiting and len(run.tokens) - len(run.closed) < 8:
            run.submit(waiting.popleft())
        if not run.step():
            break
    assert run.core.counters.preempted > 0
    assert run.deepest == 2
    for request in asked:
        stopped = run.tokens[request.request][-1] in request.stop_tokens
        assert run.closed[request.request].reason is (Reason.EOS if stopped else Reason.LENGTH)
        assert run.tokens[request.request] == expected(request)
    engine.close()
    assert not toy().running + toy().waiting


def test_clients_that_leave_take_nothing_with_them() -> None:
    engine = make(kv_tokens=640, lease_tokens=16)
    run = Run(engine, Core(CoreConfig(reserve_tokens=16)))
    run.begin()
    asked = requests(9)
    for request in asked:
        run.submit(request)
    left = {request.request for request in asked if request.request % 3 == 0}
    for number in range(STEPS_MAX):
        if number % 7 == 3 and left - run.closed.keys():
            run.cancel(min(left - run.closed.keys()))
        if not run.step():
            break
    for request in asked:
        got = run.tokens[request.request]
        if run.closed[request.request].reason is Reason.CANCELLED:
            assert expected(request)[: len(got)] == got
        else:
            assert expected(request) == got
    assert any(one.reason is Reason.CANCELLED for one in run.closed.values())
    engine.close()


def test_a_request_that_fails_ends_alone() -> None:
    engine = make(kv_tokens=640, lease_tokens=16)
    toy().fault = lambda request: "it is cursed" if request.tokens[0] == 7 else ""
    run = Run(engine, Core(CoreConfig()))
    run.begin()
    for number in range(1, 6):
        prompt = (7 if number == 3 else 8, number)
        run.submit(Submitted(number, "m", prompt, 10, sampling=SamplingParams()))
    while run.step():
        pass
    assert run.closed.pop(3).reason is Reason.ENGINE_FAILED
    assert {one.reason for one in run.closed.values()} == {Reason.LENGTH}
    engine.close()
