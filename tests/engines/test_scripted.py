"""The scripted engine: the contract, and what only it can do."""

import time
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from shards.engines import load
from shards.engines.base import (
    Engine,
    EngineLost,
    EngineOptions,
    ModelError,
    Plan,
    SamplingParams,
)
from tests.engines.contract import EngineContract, admit, decode, generate
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract


def make(**extra: object) -> Engine:
    pairs = tuple((key, str(value)) for key, value in extra.items())
    options = EngineOptions(None, "scripted", 4096, 8, 256, extra=pairs)
    return load("scripted", options, lambda _fraction: None)


def text_of(engine: Engine, tokens: list[int]) -> str:
    tokenizer = Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
    return tokenizer.decode(tokens, skip_special_tokens=False)


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = make()
        yield engine
        engine.close()

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return [[(7 * n + k * k) % 256 for k in range(24 + 5 * n)] for n in range(4)]


def test_text_is_readable_and_has_split_characters() -> None:
    engine = make()
    drawn = generate(engine, 1, [3, 1, 4], 400)
    # The last character may lack its end.
    text = text_of(engine, drawn).rstrip("�")
    assert "�" not in text
    assert {"é", "日", "🚂"} <= set(text)
    assert len(text) < 400 * 6
    # A train takes five tokens: the space, and the four bytes of the character.
    assert (
        len(
            Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
            .encode(" 🚂")
            .ids
        )
        == 5
    )


def test_different_prompts_are_answered_differently() -> None:
    engine = make()
    answers = {tuple(generate(engine, n, [3, n], 12)) for n in range(1, 7)}
    assert len(answers) == 6


def test_answer_is_given_then_ended() -> None:
    engine = make(answer="Wir fahren 🚂 nach 日本.")
    eos = engine.describe().eos_token_ids[0]
    drawn = generate(engine, 1, [5, 6], 60)
    end = drawn.index(eos)
    assert text_of(engine, drawn[:end]) == "Wir fahren 🚂 nach 日本."
    assert set(drawn[end:]) == {eos}


def test_length_ends_the_text() -> None:
    engine = make(length=5)
    eos = engine.describe().eos_token_ids[0]
    assert [token == eos for token in generate(engine, 1, [5, 6], 7)] == [False] * 5 + [True] * 2


def test_steps_tick_on_one_clock() -> None:
    engine = make(step_ms=10)
    engine.step(Plan(admits=[admit(1, [1, 2])], work=[(1, 2)]))
    began = time.monotonic()
    decode(engine, 1, 20)
    took = time.monotonic() - began
    # Never faster than the clock; the first step may have begun on the tick of the one before.
    assert took >= 0.189


def test_prefill_takes_its_time() -> None:
    engine = make(token_us=1000)
    began = time.monotonic()
    engine.step(Plan(admits=[admit(1, [1] * 51)], work=[(1, 51)]))
    assert time.monotonic() - began >= 0.050


def test_a_step_without_work_takes_no_time() -> None:
    engine = make(step_ms=60_000)
    engine.step(Plan(admits=[admit(1, [1, 2])]))
    engine.step(Plan(drops=[1]))


def test_sequences_fail_alone() -> None:
    engine = make(fail_sequence_after=2)
    plan = Plan(admits=[admit(1, [1]), admit(2, [2, 3])], work=[(1, 1), (2, 1)])
    assert engine.step(plan).sequences == [1]
    assert engine.step(Plan(work=[(1, 1), (2, 1)])).sequences == [1, 2]
    third = engine.step(Plan(work=[(1, 1), (2, 1)]))
    assert third.sequences == [2]
    assert third.failures == {1: "the script fails after 2 tokens"}
    # Work that was planned before the failure was known is no fault of the plan.
    assert engine.step(Plan(work=[(1, 1)])).sequences == []
    engine.step(Plan(drops=[1]))


def test_the_device_is_lost_on_time() -> None:
    engine = make(lost_after_steps=2)
    generate(engine, 1, [1, 2], 2)
    engine.step(Plan())
    with pytest.raises(EngineLost):
        decode(engine, 1, 1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"step_mss": 1}, "unknown engine option step_mss"),
        ({"step_ms": "fast"}, "step_ms=fast is not a number"),
        ({"step_ms": -1}, "step_ms=-1 is not a number >= 0"),
        ({"step_ms": "nan"}, "step_ms=nan is not a number"),
        ({"length": 1.5}, "length takes a whole number"),
        ({"length": 5, "answer": "x"}, "exclude each other"),
    ],
)
def test_faulty_options_are_named(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(**extra)


def test_unknown_engine_is_named() -> None:
    with pytest.raises(ModelError, match=r"called nope; there is .*llamacpp.*scripted"):
        load("nope", EngineOptions(None, "x"), lambda _fraction: None)


def test_a_thousand_sequences_are_cheap() -> None:
    """64 sequences a step must cost well under a millisecond: the router is measured with this."""
    options = EngineOptions(None, "scripted")
    engine = load("scripted", options, lambda _fraction: None)
    numbers = range(1, 1001)
    admits = [admit(n, [n % 256, 1], SamplingParams()) for n in numbers]
    engine.step(Plan(admits=admits, work=[(n, 2) for n in numbers]))
    plan = Plan(work=[(n, 1) for n in numbers])
    best = min(_cpu_of(engine, plan) for _ in range(20))
    assert best < 1000 / 64 * 0.5e-3


def _cpu_of(engine: Engine, plan: Plan) -> float:
    began = time.thread_time()
    engine.step(plan)
    return time.thread_time() - began
