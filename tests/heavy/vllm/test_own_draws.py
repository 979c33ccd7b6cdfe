"""What vLLM's own sampler draws (``sampler=vllm``) beside what the host's does.

Not the same tokens for a seed: the same chances. Where there is nothing to chance, the same tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards.engines.base import Outcome, Plan, SamplingParams
from shards.engines.vllm_engine import VllmEngine
from tests.engines.contract_grammar import CASES, under
from tests.engines.driving import GREEDY, admit, generate
from tests.engines.test_sampling import warp
from tests.heavy.drawing import Row as Asked
from tests.heavy.models import TINY_VOCAB
from tests.heavy.vllm.own import SEQUENCES, by_host, change_logits, make

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


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


# The same as the host's ---------------------------------------------------------------------------

CERTAIN: dict[str, SamplingParams] = {
    "plain": GREEDY,
    "penalised": SamplingParams(repetition_penalty=1.5),
    "penalised otherwise": SamplingParams(frequency_penalty=1.7, presence_penalty=-0.4),
    "biased": SamplingParams(logit_bias=((70, 4.0), (71, -2.0), (70, 4.0))),
    "barred": SamplingParams(min_tokens=6, stop_tokens=(*range(0, 256, 2), 100_000)),
    "constrained": under("schema"),
    "all": SamplingParams(
        constraint=CASES["schema"][0],
        repetition_penalty=1.2,
        presence_penalty=0.5,
        logit_bias=((105, 2.0),),
        min_tokens=3,
        stop_tokens=(257,),
    ),
    "top_k of one": SamplingParams(temperature=1.0, top_k=1, seed=5),
    "top_p of one": SamplingParams(temperature=1.0, top_p=1e-6, seed=6),
    "min_p of one": SamplingParams(temperature=1.0, min_p=1.5, seed=7),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_without_chance_tokens_and_logprobs_are_the_hosts(
    engine: VllmEngine, prompts: list[list[int]], name: str
) -> None:
    """Of a sequence from its start, and of one that came with generated tokens."""
    told = {"logprobs": True, "top_logprobs": 4, "ranks": True}
    sampling, prompt = replace(CERTAIN[name], **told), prompts[2][:30]  # type: ignore[arg-type]

    def run(known: Sequence[int]) -> list[Outcome]:
        tokens = [*prompt, *known]
        made = admit(1, tokens, sampling, prompt_len=len(prompt))
        outcomes = [engine.step(Plan(admits=[made], work=[(1, len(tokens))]))]
        outcomes += [engine.step(Plan(work=[(1, 1)])) for _ in range(10 - len(known))]
        return outcomes

    with by_host(engine):
        expected = run([])
    known = [one.tokens[0] for one in expected[:4]]
    _check_same(run([]), expected)
    engine.reset()
    _check_same(run(known), expected[4:])


def _check_same(found: Sequence[Outcome], expected: Sequence[Outcome]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        told, wanted = one.logprobs[1], other.logprobs[1]
        assert told.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert list(told.top_tokens) == list(wanted.top_tokens)
        assert list(told.top_values) == pytest.approx(list(wanted.top_values), abs=1e-4)
        assert told.rank == wanted.rank


def test_equal_tokens_are_told_in_the_order_of_ids_and_have_one_rank(
    engine: VllmEngine,
) -> None:
    sampler = engine._runner.sampler
    scores = torch.log_softmax(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), dim=-1)
    ranks = [
        sampler.gather_logprobs(scores, 2, torch.tensor([n])).selected_token_ranks.item()
        for n in range(5)
    ]
    assert ranks == [5, 1, 3, 1, 3]


# The chances that the host gives ------------------------------------------------------------------

CHANCES: dict[str, SamplingParams] = {
    "warm": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(temperature=1.5, top_k=12),
    "top_p": SamplingParams(temperature=1.3, top_p=0.8),
    "top_k and top_p": SamplingParams(temperature=2.0, top_k=30, top_p=0.7),
    "min_p": SamplingParams(temperature=1.6, min_p=0.1),
    "top_k and min_p": SamplingParams(temperature=2.0, top_k=20, min_p=0.2),
    "penalised": SamplingParams(temperature=1.4, repetition_penalty=1.4, top_p=0.9),
    "penalised otherwise": SamplingParams(
        temperature=1.4, frequency_penalty=0.6, presence_penalty=0.5
    ),
    "biased": SamplingParams(
        temperature=1.4,
        logit_bias=((20, 4.0), (22, 3.0)),
        min_tokens=9,
        stop_tokens=(*range(30, 200),),
        top_k=25,
    ),
}
DRAWS = 3200
# Generated before; they are in the prompts as well, where they do not count.
KNOWN = [3, 3, 3, 50, 51, 270]


def known_logits() -> NDArray[np.float32]:
    """Of one row, with the tokens that penalties lower among the likely ones."""
    logits = np.random.default_rng(3).normal(0.0, 2.0, TINY_VOCAB).astype(np.float32)
    logits[KNOWN] = 5.0, 5.0, 5.0, 4.5, -0.5, 4.0
    return logits


@pytest.mark.parametrize("way", ["cpu", "native"])
@pytest.mark.parametrize("name", CHANCES)
def test_tokens_come_as_often_as_their_chances_say(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    """Of many seeds and positions, with logits that are known.

    On a GPU vLLM takes its native way, since rows have generators; that can be taken here, too.
    """
    drawing = engine._runner.sampler.topk_topp_sampler
    monkeypatch.setattr(drawing, "forward", getattr(drawing, f"forward_{way}"))
    logits = known_logits()
    given = torch.from_numpy(logits)
    change_logits(engine, monkeypatch, lambda seen: seen.copy_(given.expand_as(seen)))
    counts = np.zeros(TINY_VOCAB)
    position = np.random.default_rng(4).integers(1, 10, DRAWS).tolist()
    for start in range(0, DRAWS, SEQUENCES):
        admits = []
        for n in range(start, start + SEQUENCES):
            prompt = [*KNOWN, 1, 2, 7][: position[n]]
            sampling = replace(CHANCES[name], seed=n // 3)
            tokens = [*prompt, *KNOWN]
            admits.append(admit(n + 1, tokens, sampling, prompt_len=len(prompt)))
        plan = Plan(
            drops=range(start - SEQUENCES + 1, start + 1) if start else (),
            admits=admits,
            work=[(one.sequence, len(one.tokens)) for one in admits],
        )
        np.add.at(counts, engine.step(plan).tokens, 1)
    assert counts.sum() == DRAWS
    chances = warp(logits, Asked(CHANCES[name], KNOWN, 0))  # type: ignore[arg-type]
    assert not counts[chances == 0.0].any()
    _check_counts(counts, chances * DRAWS)


def _check_counts(counts: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Chi-squared; the rare ones are taken together. It would be so large once in 30,000 tries."""
    often = expected >= 8.0
    seen = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], max(expected[~often].sum(), 1e-9))
    freedom = int(often.sum())
    assert freedom >= 5
    bound = freedom * (1 - 2 / (9 * freedom) + 4.0 * math.sqrt(2 / (9 * freedom))) ** 3
    assert float(((seen - wanted) ** 2 / wanted).sum()) < bound


def test_a_draw_depends_on_its_position(
    engine: VllmEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_logits(engine, monkeypatch, torch.Tensor.zero_)
    drawn = generate(engine, 1, prompts[0], 120, SamplingParams(temperature=1.0, seed=8))
    # Of 288 equally likely tokens 98 different ones are expected.
    assert 80 < len(set(drawn)) < 115
