"""vLLM's own sampler (``sampler=vllm``): the contract, beside the host's, and what goes wrong."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards.engines.base import (
    Constraint,
    ConstraintKind,
    Engine,
    Plan,
    SamplingParams,
    Watermark,
)
from shards.engines.vllm_engine import VllmEngine
from shards.sampling import Drawn, Row, Sampler
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract, under
from tests.engines.contract_prompts import PromptContract
from tests.engines.driving import GREEDY, SEEDED, admit, generate
from tests.heavy.models import TINY_VOCAB
from tests.heavy.vllm.own import change_logits, make

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

# What vLLM draws ...
OWN: dict[str, SamplingParams] = {
    "greedy": GREEDY,
    "warm": SamplingParams(temperature=1.5, seed=1),
    "top_k": SamplingParams(temperature=1.2, top_k=7, seed=2),
    "top_p": SEEDED,
    "min_p": SamplingParams(temperature=2.0, top_k=30, min_p=0.05, seed=3),
    "penalised": SamplingParams(
        temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, seed=4, presence_penalty=0.3
    ),
    "biased": SamplingParams(temperature=1.2, logit_bias=((65, 3.0), (66, -3.0)), seed=5),
    "barred": SamplingParams(temperature=1.2, min_tokens=5, stop_tokens=(*range(90),), seed=6),
    "told": SamplingParams(temperature=1.2, seed=7, logprobs=True, top_logprobs=3, ranks=True),
    "constrained": under("schema", "sampled"),
    "constrained and penalised": under("regex", "penalised", min_tokens=3, stop_tokens=(257,)),
}
# ... and what is the host's in the same batch.
HOSTED: dict[str, SamplingParams] = {
    "typical": SamplingParams(temperature=1.2, typical_p=0.8, seed=8),
    "marked": SamplingParams(temperature=1.2, watermark=Watermark(0.25, 4.0, 99), seed=9),
    "both": SamplingParams(temperature=1.2, top_p=0.9, min_p=0.02, seed=10),
    "hot": SamplingParams(temperature=4.0, top_k=50, seed=11),
    "cold": SamplingParams(temperature=0.005, seed=12),
    "strong": SamplingParams(presence_penalty=100.0),
    "constrained and typical": under("regex", "sampled", typical_p=0.9),
}
ALL = {**OWN, **HOSTED}


@pytest.fixture(scope="module")
def loaded() -> Iterator[VllmEngine]:
    engine = make()
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: VllmEngine) -> VllmEngine:
    loaded.reset()
    return loaded


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(7).integers
    return [draw(0, 256, 40 + 9 * n).tolist() for n in range(5)]


class TestContract(GrammarContract, PromptContract, EngineContract):
    late = True

    @pytest.fixture
    def engine(self, loaded: VllmEngine) -> Engine:
        loaded.reset()
        return loaded


# Who draws ----------------------------------------------------------------------------------------


class _Spy(Sampler):
    """The host's sampler, and whose rows it drew."""

    def __init__(self) -> None:
        super().__init__(TINY_VOCAB, 1)
        self.seen: list[SamplingParams] = []

    def draw(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> Drawn:
        self.seen += [row.sampling for row in rows]
        return super().draw(logits, rows)


def test_the_host_draws_what_vllm_cannot_and_nothing_else(
    engine: VllmEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.engines import vllm_sampling

    masked: list[list[str]] = []
    mask = vllm_sampling.apply_grammar_bitmask

    def watched(step: object, masks: object, *more: object) -> None:
        masked.append(masks.structured_output_request_ids)  # type: ignore[attr-defined]
        mask(step, masks, *more)

    spy = _Spy()
    monkeypatch.setattr(engine._processor, "_sampler", spy)
    monkeypatch.setattr(vllm_sampling, "apply_grammar_bitmask", watched)
    asked = dict(enumerate(ALL.items(), start=1))
    prompt = prompts[0][:20]
    admits = [admit(n, prompt, sampling) for n, (_, sampling) in asked.items()]
    engine.step(Plan(admits=admits, work=[(n, len(prompt)) for n in asked]))
    engine.step(Plan(work=[(n, 1) for n in asked]))
    assert sorted(map(repr, spy.seen)) == sorted(map(repr, [*HOSTED.values()] * 2))
    guided = [str(n) for n, (_, one) in asked.items() if one.constraint]
    assert masked == [guided[:-1]] * 2


@pytest.mark.parametrize("name", ALL)
def test_neighbours_and_chunks_change_no_draw(
    engine: VllmEngine, prompts: list[list[int]], name: str
) -> None:
    """One sequence alone, and in three chunks among all others, which come, pause and go."""
    prompt, sampling, count = prompts[1], ALL[name], 9
    alone = generate(engine, 1, prompt, count, sampling)
    assert alone == _among_others(engine, prompts, sampling, count)
    if sampling.temperature > 0.1 and sampling.constraint is None:
        engine.reset()
        seeds = [replace(sampling, seed=seed) for seed in (100, 101)]
        assert len({tuple(generate(engine, n, prompt, 6, one)) for n, one in enumerate(seeds)}) == 2


def _among_others(
    engine: VllmEngine, prompts: list[list[int]], sampling: SamplingParams, count: int
) -> list[int]:
    engine.reset()
    mine, short = 99, prompts[0][:12]
    chunks = [7, 11, len(prompts[1]) - 18]
    drawn: list[int] = []
    here: list[int] = []
    waiting = list(enumerate(ALL.values(), start=1))
    step = 0
    while len(drawn) < count:
        drops = [here.pop(0)] if step % 4 == 3 else []
        work = [(n, 1) for n in here if (n + step) % 3]
        admits = [admit(n, short, one) for n, one in waiting[:5]]
        work += [(one.sequence, len(short)) for one in admits]
        if not step:
            admits.append(admit(mine, prompts[1], sampling))
        work.insert(len(work) // 2, (mine, chunks.pop(0) if chunks else 1))
        outcome = engine.step(Plan(drops=drops, admits=admits, work=work))
        drawn += [
            token for n, token in zip(outcome.sequences, outcome.tokens, strict=True) if n == mine
        ]
        here += [one.sequence for one in admits if one.sequence != mine]
        del waiting[:5]
        step += 1
    return drawn


# What goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_fail_their_sequences(
    engine: VllmEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Also where the token that they belong to is barred, and in every way to draw."""
    barred = replace(OWN["barred"], stop_tokens=(5,))
    asked = dict(enumerate([*ALL.values(), barred], start=1))
    prompt = prompts[0][:20]
    work = [(n, len(prompt)) for n in asked]
    made = [admit(n, prompt, one) for n, one in asked.items()]
    engine.step(Plan(admits=made, work=work))
    residents = engine._processor._residents

    def spoil(logits: torch.Tensor) -> None:
        for row, resident in residents.items():
            if resident.sequence % 100 < 50:
                logits[row, 5] = value

    well = {60: OWN["warm"], 61: HOSTED["typical"], 62: OWN["told"]}
    alone = {n: generate(engine, n, prompt, 1, one) for n, one in well.items()}
    engine.step(Plan(drops=list(well)))
    change_logits(engine, monkeypatch, spoil)
    soothed = _watch(engine, monkeypatch)
    plan = Plan(
        admits=[admit(n, prompt, one) for n, one in well.items()],
        work=[*((n, 1) for n in asked), *((n, len(prompt)) for n in well)],
    )
    outcome = engine.step(plan)
    assert outcome.failures.keys() == asked.keys()
    assert {*outcome.failures.values()} == {"the engine's logits are not finite numbers"}
    assert outcome.sequences == list(well)
    assert outcome.tokens == [alone[n][0] for n in well]
    assert 62 in outcome.logprobs
    assert soothed == [True]


def _watch(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether all rows that vLLM draws from are such that its operators can draw, at each step."""
    sampler = engine._runner.sampler
    sample, seen = sampler.sample, []

    def watched(logits: torch.Tensor, *more: object) -> object:
        seen.append(bool(logits.amax(dim=-1).isfinite().all()))
        return sample(logits, *more)

    monkeypatch.setattr(sampler, "sample", watched)
    return seen


def test_a_sequence_without_a_token_left_fails_alone(
    engine: VllmEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts[0][:20]
    only = Constraint(ConstraintKind.REGEX, "A+")
    letter = 32  # of the tokenizer of bytes
    bars = {"min_tokens": 2, "stop_tokens": tuple(range(TINY_VOCAB))}
    warm = replace(OWN["warm"], **bars)  # type: ignore[arg-type]
    guided = SamplingParams(constraint=only, min_tokens=2, stop_tokens=(letter,))
    alone = generate(engine, 1, prompt, 1, OWN["top_k"])
    assert generate(engine, 2, prompt, 1, SamplingParams(constraint=only)) == [letter]
    soothed = _watch(engine, monkeypatch)
    for hosted in (False, True):
        engine.reset()
        engine._processor._own = engine._steps._own = not hosted
        made = [admit(1, prompt, warm), admit(2, prompt, guided), admit(3, prompt, OWN["top_k"])]
        outcome = engine.step(Plan(admits=made, work=[(n, len(prompt)) for n in (1, 2, 3)]))
        engine._processor._own = engine._steps._own = True
        assert outcome.failures == {
            1: "bias, penalties and min_tokens leave no token to draw",
            2: "the constraint, bias and penalties leave no token to draw",
        }
        assert outcome.sequences == [3]
        if not hosted:
            assert outcome.tokens == alone
    assert soothed == [True, True]
