"""llama.cpp with a divided cache: the contract, and the answers that one pool gives.

The contract runs without rounding, as in one pool its last digits depend on where cells lie. That
sequences move without loss is shown here with the real cache, and in ``test_llama_layouts``.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from shards.engines.base import Engine, ModelError, Plan, PlanError, SamplingParams
from shards.engines.llama_sizes import part_tokens
from shards.engines.llamacpp import LlamaCppEngine
from tests.engines.contract import admit, decode
from tests.engines.contract_split import PART, PROMPTS, SplitContract
from tests.engines.unrounded import make_llamacpp, make_unrounded
from tests.heavy.models import smollm2_gguf

# In nats: what float32 adds up in another order.
EQUAL = 1e-3


@pytest.fixture(scope="module")
def split() -> Iterator[Engine]:
    engine = make_unrounded("cpu", 12 * PART, kv="split")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def unified() -> Iterator[Engine]:
    engine = make_unrounded("cpu")
    yield engine
    engine.close()


class TestContract(SplitContract):
    @pytest.fixture
    def engine(self, split: Engine) -> Engine:
        split.reset()
        return split


def test_each_sequence_has_an_equal_part_for_itself(split: Engine) -> None:
    info = split.describe()
    assert info.sequences_max == 12
    assert info.length_max == PART
    assert info.kv_tokens == 12 * PART


def test_scattered_and_moved_sequences_answer_as_in_one_pool(
    split: Engine, unified: Engine
) -> None:
    """All parts in use, some sequences at rest among those at work, ends and new ones between."""

    def run(engine: Engine) -> dict[int, list[tuple[int, float]]]:
        engine.reset()
        seen: dict[int, list[tuple[int, float]]] = {}

        def step(plan: Plan) -> None:
            outcome = engine.step(plan)
            for number, token in zip(outcome.sequences, outcome.tokens, strict=True):
                told = outcome.logprobs[number].logprob
                seen.setdefault(number, []).append((token, told))

        sampling = SamplingParams(temperature=1.0, seed=3, logprobs=True)
        prompts = {number: [number, *PROMPTS[3][:40]] for number in range(1, 13)}
        for number, prompt in prompts.items():
            work = [(number, len(prompt)), *((other, 1) for other in range(1, number, 2))]
            step(Plan(admits=[admit(number, prompt, sampling)], work=work))
        for turn in range(6):
            step(Plan(work=[(number, 1) for number in range(12, 0, -(2 + turn))]))
        # Two that begin as the third did, the second of them as a copy of the first.
        begin = prompts[3][:32]
        first = admit(13, [*begin, 13], sampling, share_from=3, share_len=32)
        second = admit(14, [*begin, 14], sampling, share_from=13, share_len=32)
        work = [(12, 1), (14, 1), (13, 1), (4, 1)]
        step(Plan(drops=[1, 2, 5, 8], admits=[first, second], work=work))
        for _ in range(4):
            step(Plan(work=[(14, 1), (3, 1), (13, 1), (9, 1)]))
        return seen

    mine, theirs = run(split), run(unified)
    assert mine.keys() == theirs.keys()
    for number, drawn in theirs.items():
        assert [token for token, _ in mine[number]] == [token for token, _ in drawn]
        told = [value for _, value in mine[number]]
        np.testing.assert_allclose(told, [value for _, value in drawn], atol=EQUAL)


def test_flash_attention_and_a_quantised_model_answer_alike_in_both_layouts() -> None:
    """What users run, on text whose next words leave no doubt."""
    drawn = []
    for kv in ("split", "unified"):
        engine = make_llamacpp(smollm2_gguf(), "cpu", 12 * PART, kv=kv)
        assert isinstance(engine, LlamaCppEngine)
        prompts = [engine._model.tokenize(text, special=False) for text in CERTAIN]
        numbers = range(1, len(prompts) + 1)
        admits = [admit(number, prompts[number - 1]) for number in numbers]
        work = [(number, len(prompts[number - 1])) for number in numbers]
        outcome = engine.step(Plan(admits=admits, work=work))
        drawn.append([*outcome.tokens, *decode(engine, 2, 4)])
        engine.close()
    assert drawn[0] == drawn[1]


CERTAIN = ("The capital of France is", "One, two, three, four, five,")


def test_a_long_sequence_is_refused_by_length_not_by_the_pool(split: Engine) -> None:
    split.reset()
    with pytest.raises(PlanError, match=f"length_max is {PART}"):
        split.step(Plan(admits=[admit(1, [1] * (PART + 1))]))


def test_nothing_is_left_of_sequences_that_were_dropped(split: Engine) -> None:
    """Each part is filled to its end, and three times over."""
    split.reset()
    prompt = [k % 250 for k in range(PART - 1)]

    def last_of(number: int, drops: list[int]) -> list[int]:
        split.step(Plan(drops=drops, admits=[admit(number, prompt)], work=[(number, 256)]))
        return split.step(Plan(work=[(number, len(prompt) - 256)])).tokens

    expected = last_of(1, [])
    for number in range(2, 40):
        assert last_of(number, [number - 12] if number > 12 else []) == expected


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"kv": "split", "exact": 1}, "exact=1 holds for kv=unified only"),
        ({"kv": "halved"}, "kv.*unified.*split"),
        ({"kv": "split"}, "12 sequences 85 tokens, and 256 are the least"),
    ],
)
def test_what_cannot_be_is_refused_by_name(extra: dict[str, object], told: str) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        make_llamacpp(smollm2_gguf(), "cpu", **extra)
    assert "\n" not in str(caught.value)


def test_parts_suit_the_model_and_the_memory() -> None:
    assert part_tokens(32, 65536, 0, 8192) == 2048
    assert part_tokens(32, 0, 1 << 20, 8192) == 2048
    assert part_tokens(32, 0, 32 * 700, 8192) == 512
    assert part_tokens(8, 65536, 0, 1000) == 1024
