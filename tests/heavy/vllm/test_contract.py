"""vLLM with a small random Llama in float32: the whole contract, token for token."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from shards.engines import load
from shards.engines.base import (
    Admit,
    Engine,
    EngineOptions,
    Plan,
    PlanError,
    SamplingParams,
    Scheduling,
)
from shards.engines.vllm_engine import VllmEngine
from shards.sampling import Drawn, Row, Sampler
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.driving import admit, decode, generate
from tests.heavy.models import TINY_VOCAB, tiny_llama_folder
from tests.heavy.vllm.adapters import write_adapter

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

EAGER = (("eager", "1"),)
ADAPTERS = ("red", "blue")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tiny_llama_folder()
    adapters = tuple(
        (name, write_adapter(tmp_path_factory.mktemp(name), folder, seed))
        for seed, name in enumerate(ADAPTERS)
    )
    options = EngineOptions(
        folder,
        "tiny",
        kv_tokens=1024,
        sequences_max=12,
        step_tokens_max=256,
        threads=1,
        dtype="float32",
        adapters=adapters,
        extra=EAGER,
    )
    engine = load("vllm", options, lambda _fraction: None)
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: VllmEngine) -> VllmEngine:
    loaded.reset()
    return loaded


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(7).integers
    return [draw(0, 256, 24 + 9 * n).tolist() for n in range(5)]


class TestContract(GrammarContract, EngineContract):
    @pytest.fixture
    def engine(self, loaded: VllmEngine) -> Engine:
        loaded.reset()
        return loaded


def test_describes_itself(engine: VllmEngine) -> None:
    info = engine.describe()
    assert info.engine == "vllm"
    assert info.engine_version.startswith("0.32.0")
    assert info.device == torch.get_default_device().type
    assert info.dtype == "float32"
    assert info.scheduling is Scheduling.CALLER
    assert (info.kv_tokens, info.page_tokens) == (1024, 32)
    assert (info.sequences_max, info.step_tokens_max) == (12, 256)
    assert info.vocab_size == TINY_VOCAB
    assert {"prefix_sharing", "lora"} <= set(info.features)
    assert info.adapters == ADAPTERS
    assert info.weight_bytes > 0


def test_sharing_whole_pages_computes_only_the_rest(
    engine: VllmEngine, prompts: list[list[int]]
) -> None:
    """A prefix of two pages: shared it is not computed again, and the answer is the same."""
    prefix = (prompts[0] * 3)[:64]
    tokens = [*prefix, *prompts[1]]
    expected = generate(engine, 1, tokens, 12)
    engine.reset()
    engine.step(Plan(admits=[admit(1, prefix)], work=[(1, 64)]))
    made = admit(2, tokens, share_from=1, share_len=64)
    first = engine.step(Plan(admits=[made], work=[(2, len(prompts[1]))]))
    assert [*first.tokens, *decode(engine, 2, 5)] == expected[:6]
    engine.step(Plan(drops=[1]))
    assert decode(engine, 2, 6) == expected[6:]


def test_a_share_of_part_of_a_page_is_refused(engine: VllmEngine, prompts: list[list[int]]) -> None:
    engine.step(Plan(admits=[admit(1, prompts[1])], work=[(1, len(prompts[1]))]))
    part = admit(2, prompts[1], share_from=1, share_len=16)
    with pytest.raises(PlanError, match="pages hold 32"):
        engine.step(Plan(admits=[part]))


def test_pages_of_dropped_sequences_are_used_again(
    engine: VllmEngine, prompts: list[list[int]]
) -> None:
    """Many lives in a cache of 32 pages, each with the answer that it has alone."""
    expected = [generate(engine, n + 1, prompt, 4) for n, prompt in enumerate(prompts)]
    engine.reset()
    for life in range(1, 60):
        prompt = prompts[life % len(prompts)]
        assert generate(engine, life, prompt, 4) == expected[life % len(prompts)]
        if life > 8:
            engine.step(Plan(drops=[life - 8]))


def test_a_number_can_be_used_again_at_once(engine: VllmEngine, prompts: list[list[int]]) -> None:
    expected = generate(engine, 2, prompts[1], 3)
    engine.reset()
    generate(engine, 1, prompts[0], 3)
    plan = Plan(drops=[1], admits=[admit(1, prompts[1])], work=[(1, len(prompts[1]))])
    assert [*engine.step(plan).tokens, *decode(engine, 1, 2)] == expected


def test_sequences_that_pause_go_on_where_they_were(
    engine: VllmEngine, prompts: list[list[int]]
) -> None:
    expected = [generate(engine, n + 1, prompts[n], 9) for n in range(3)]
    engine.reset()
    drawn: list[list[int]] = [generate(engine, n + 1, prompts[n], 1) for n in range(3)]
    for turn in range(12):
        busy = [n for n in range(3) if (turn + n) % 3]
        outcome = engine.step(Plan(work=[(n + 1, 1) for n in busy]))
        assert outcome.sequences == [n + 1 for n in busy]
        for n, token in zip(busy, outcome.tokens, strict=True):
            drawn[n].append(token)
    assert drawn == expected


def test_outcomes_are_in_the_order_of_the_work(
    engine: VllmEngine, prompts: list[list[int]]
) -> None:
    for n in (1, 2, 3):
        generate(engine, n, prompts[n], 1)
    assert engine.step(Plan(work=[(3, 1), (1, 1), (2, 1)])).sequences == [3, 1, 2]


def test_a_sequence_may_be_as_long_as_is_said(engine: VllmEngine, prompts: list[list[int]]) -> None:
    """The token that is drawn behind the longest sequence has room too."""
    length = engine.describe().length_max
    tokens = (prompts[0] * 60)[: length - 2]
    for start in range(0, len(tokens), 256):
        admits = [admit(1, tokens)] if not start else []
        engine.step(Plan(admits=admits, work=[(1, min(256, len(tokens) - start))]))
    assert len(decode(engine, 1, 2)) == 2
    with pytest.raises(PlanError, match="length_max"):
        engine.step(Plan(work=[(1, 1)]))


class _Spy(Sampler):
    """The sampler, and the logits that it saw last."""

    seen: np.ndarray

    def draw(self, logits: np.ndarray, rows: Sequence[Row]) -> Drawn:
        self.seen = logits.copy()
        return super().draw(logits, rows)


def test_only_rows_that_are_not_plain_leave_the_device(
    engine: VllmEngine, prompts: list[list[int]]
) -> None:
    spy = engine._processor._sampler = _Spy(TINY_VOCAB)
    for n in (1, 2, 3):
        sampling = SamplingParams(temperature=1.0) if n == 2 else SamplingParams()
        engine.step(Plan(admits=[admit(n, prompts[n], sampling)], work=[(n, len(prompts[n]))]))
    engine.step(Plan(work=[(1, 1), (2, 1), (3, 1)]))
    assert spy.seen.shape == (1, TINY_VOCAB)


def test_logits_that_are_not_numbers_fail_one_sequence(
    engine: VllmEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (1, 2, 3, 4):
        sampling = SamplingParams(temperature=1.0) if n % 2 else SamplingParams()
        engine.step(Plan(admits=[admit(n, prompts[n], sampling)], work=[(n, len(prompts[n]))]))
    processor, apply = engine._processor, engine._processor.apply

    def broken(logits: torch.Tensor) -> torch.Tensor:
        for row, resident in processor._residents.items():
            if resident.sequence < 3:
                logits[row, 5] = float("nan")
        return apply(logits)

    monkeypatch.setattr(processor, "apply", broken)
    outcome = engine.step(Plan(work=[(n, 1) for n in (1, 2, 3, 4)]))
    assert outcome.sequences == [3, 4]
    assert set(outcome.failures) == {1, 2}
    assert "finite" in outcome.failures[1]
    monkeypatch.undo()
    # Who failed is still resident, but computes no more.
    assert engine.step(Plan(work=[(n, 1) for n in (1, 2, 3, 4)])).sequences == [3, 4]
    engine.step(Plan(drops=[1, 2]))


# Adapters -----------------------------------------------------------------------------------------


def test_each_sequence_has_the_adapter_that_it_names(
    engine: VllmEngine, prompts: list[list[int]]
) -> None:
    """Three sequences with one prompt in one batch, each as if it were alone."""
    names = ("", *ADAPTERS)
    alone = {}
    for name in names:
        engine.reset()
        alone[name] = _generate(engine, {1: name}, prompts[0])[1]
    assert len({tuple(drawn) for drawn in alone.values()}) == 3
    engine.reset()
    numbers = dict(enumerate(names, start=1))
    together = _generate(engine, numbers, prompts[0])
    assert together == {number: alone[name] for number, name in numbers.items()}


def _generate(engine: Engine, names: dict[int, str], prompt: list[int]) -> dict[int, list[int]]:
    admits = [_with_adapter(number, prompt, name) for number, name in names.items()]
    outcome = engine.step(Plan(admits=admits, work=[(n, len(prompt)) for n in names]))
    drawn = {n: [token] for n, token in zip(outcome.sequences, outcome.tokens, strict=True)}
    for _ in range(5):
        outcome = engine.step(Plan(work=[(n, 1) for n in names]))
        for n, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[n].append(token)
    return drawn


def _with_adapter(number: int, prompt: list[int], name: str) -> Admit:
    return replace(admit(number, prompt), adapter=name)
