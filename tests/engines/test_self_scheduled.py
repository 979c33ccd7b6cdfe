"""How an engine that schedules itself keeps the log of plans: leases, buffers, drops, deadlines.

The engine under it is SGLang's fake: requests that wait for memory and run at their own pace.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shards.engines import load as load_engine
from shards.engines.base import Engine, EngineLost, EngineOptions, Plan, SamplingParams
from tests.engines.contract import SEEDED, admit, decode, generate
from tests.engines.driving import until
from tests.engines.signatures import fake_sglang
from tests.engines.signatures.strict import installed
from tests.engines.signatures.toy import ToyEngine
from tests.heavy.models import tiny_llama_folder

PROMPT = list(range(30, 60))


@pytest.fixture(autouse=True)
def package() -> Iterator[None]:
    fake_sglang.Engine.made.clear()
    with installed(sglang=fake_sglang.module()):
        yield


Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Engine] = []

    def build(sequences_max: int = 4, kv_tokens: int = 1024, **extra: Any) -> Engine:
        given = {"deterministic": 1, **extra}
        options = EngineOptions(
            tiny_llama_folder(),
            "tiny",
            kv_tokens=kv_tokens,
            sequences_max=sequences_max,
            extra=tuple((key, str(value)) for key, value in given.items()),
        )
        made.append(load_engine("sglang", options, lambda _fraction: None))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def toy() -> ToyEngine:
    return fake_sglang.Engine.made[-1].toy


@pytest.mark.parametrize("sampling", [SamplingParams(), SEEDED], ids=["greedy", "seeded"])
def test_leases_are_seamless(make: Make, sampling: SamplingParams) -> None:
    whole = generate(make(lease_tokens=128), 1, PROMPT, 40, sampling)
    assert len(toy().asked) == 1
    assert generate(make(lease_tokens=7), 1, PROMPT, 40, sampling) == whole
    asked = toy().asked
    assert [request.count for request in asked] == [7] * 6
    assert [request.prompt_len for request in asked] == [30 + 7 * n for n in range(6)]
    assert len({request.key for request in asked}) == 6


def test_the_engine_runs_ahead_by_no_more_than_a_lease(make: Make) -> None:
    engine = make(lease_tokens=16)
    generate(engine, 1, PROMPT, 1)
    until(lambda: not toy().running)
    assert len(toy().asked) == 1
    assert len(toy().asked[0].made) == 16
    # What was made ahead needs no engine.
    toy().stalled = True
    assert decode(engine, 1, 15) == toy().asked[0].made[1:]


def test_what_the_router_may_admit_never_waits_in_the_engine(make: Make) -> None:
    engine = make(sequences_max=4, kv_tokens=256, lease_tokens=32)
    info = engine.describe()
    length = info.kv_tokens // 4
    for sequence in range(1, 5):
        tokens = [sequence] * (length - 20)
        engine.step(Plan(admits=[admit(sequence, tokens)], work=[(sequence, len(tokens))]))
    for _ in range(19):
        assert len(engine.step(Plan(work=[(n, 1) for n in range(1, 5)])).tokens) == 4
    assert toy().queued_most <= 1, "a request waits for the iteration under way, and no longer"
    assert all(request.reserved <= length + 32 for request in toy().asked)


def test_a_drop_aborts_the_request(make: Make) -> None:
    engine = make(lease_tokens=500)
    toy().stalled = True
    engine.step(Plan(admits=[admit(1, PROMPT)], work=[(1, 10)]))
    until(lambda: len(toy().waiting) + len(toy().running) == 1)
    engine.step(Plan(drops=[1]))
    until(lambda: not toy().waiting + toy().running)
    assert toy().aborted == [toy().asked[0].key]
    toy().stalled = False
    assert len(generate(engine, 1, PROMPT, 3)) == 3


def test_a_prompt_is_under_way_from_its_first_chunk_on(make: Make) -> None:
    engine = make()
    engine.step(Plan(admits=[admit(1, PROMPT)]))
    assert toy().asked == []
    engine.step(Plan(work=[(1, 5)]))
    until(lambda: bool(toy().asked and toy().asked[0].made))
    toy().stalled = True
    assert engine.step(Plan(work=[(1, 24)])).tokens == []
    assert engine.step(Plan(work=[(1, 1)])).tokens == toy().asked[0].made[:1]


def test_a_token_that_does_not_come_is_the_loss_of_the_engine(make: Make) -> None:
    engine = make(answer_s=0.2)
    generate(engine, 1, PROMPT, 2)
    toy().stalled = True
    plan = Plan(admits=[admit(2, PROMPT)], work=[(1, 1), (2, 30)])
    with pytest.raises(EngineLost, match=r"no token for 1 sequences, the first being 2, within"):
        engine.step(plan)
    with pytest.raises(EngineLost):
        engine.step(Plan())


def test_an_engine_that_ends_a_request_without_a_token_fails_it(make: Make) -> None:
    engine = make()
    toy().running_max = 0
    engine.step(Plan(admits=[admit(1, PROMPT)], work=[(1, 5)]))
    until(lambda: bool(toy().waiting))
    engine._loop.call(toy().abort, toy().waiting[0].key)
    outcome = engine.step(Plan(work=[(1, 25)]))
    assert outcome.failures == {1: "sglang aborted the request: Aborted"}
    assert outcome.tokens == []
    # It has failed once and for all.
    assert engine.step(Plan(work=[(1, 1)])).failures == {}
    engine.step(Plan(drops=[1]))


def test_tokens_from_before_a_fault_are_still_told(make: Make) -> None:
    engine = make(lease_tokens=8)
    toy().fault = lambda request: "no more of this" if len(request.made) == 3 else ""
    told = generate(engine, 1, PROMPT, 3)
    assert told == toy().asked[0].made
    outcome = engine.step(Plan(work=[(1, 1)]))
    assert outcome.failures == {1: "sglang refused the request: no more of this"}


def test_an_engine_that_makes_too_many_tokens_is_not_trusted(make: Make) -> None:
    engine = make(lease_tokens=4)
    whole = fake_sglang.Engine.request_of

    def generous(self: Any, given: dict[str, Any]) -> Any:
        request = whole(self, given)
        request.count += 1
        return request

    fake_sglang.Engine.made[-1].request_of = generous.__get__(fake_sglang.Engine.made[-1])  # type: ignore[method-assign]
    with pytest.raises(EngineLost, match="5 tokens came of 4"):
        generate(engine, 1, PROMPT, 6)


def test_a_stop_token_ends_the_lease_but_not_the_sequence(make: Make) -> None:
    engine = make()
    free = generate(engine, 1, PROMPT, 8)
    stop = free[3]
    engine.reset()
    toy().asked.clear()
    assert generate(engine, 2, PROMPT, 4, SamplingParams(stop_tokens=(stop,))) == free[:4]
    assert toy().asked[0].reason == "stop"
    # The router ends a sequence; an engine that was asked for more goes on.
    assert decode(engine, 2, 4) == free[4:]


def test_min_tokens_bars_stop_tokens_for_exactly_as_long(make: Make) -> None:
    engine = make()
    free = generate(engine, 1, PROMPT, 6)
    engine.reset()
    toy().asked.clear()
    sampling = SamplingParams(min_tokens=3, stop_tokens=(free[0], 5000))
    drawn = generate(engine, 2, PROMPT, 6, sampling)
    assert free[0] not in drawn[:3]
    assert [request.count for request in toy().asked][:2] == [3, 128]
    known = [*PROMPT, *drawn[:3]]
    engine.reset()
    assert generate(engine, 3, known, 3) == drawn[3:]


def test_a_new_epoch_ends_what_the_last_one_asked_for(make: Make) -> None:
    engine = make(lease_tokens=300)
    toy().stalled = True
    for n in (1, 2, 3):
        engine.step(Plan(admits=[admit(n, PROMPT)], work=[(n, 5)]))
    until(lambda: len(toy().asked) == 3)
    engine.reset()
    assert sorted(toy().aborted) == sorted(request.key for request in toy().asked)
    toy().stalled = False
    assert len(generate(engine, 1, PROMPT, 4)) == 4


def test_the_longest_sequence_draws_one_more_token(make: Make) -> None:
    engine = make(sequences_max=1, kv_tokens=64, lease_tokens=8)
    length = engine.describe().length_max
    tokens = [n % 250 for n in range(length)]
    assert len(generate(engine, 1, tokens, 1)) == 1
    assert toy().asked[-1].count == 1
