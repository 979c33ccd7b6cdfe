"""llama.cpp with a KV cache of another type than its usual one: what it rounds, what it takes."""

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shards.engines.base import Engine, ModelError, Plan
from shards.engines.llama_native import CACHE_TYPES
from shards.engines.llama_sizes import BLOCK, BLOCK_BYTES, kv_bytes_per_token, kv_tokens_default
from shards.gguf_file import read_metadata
from tests.engines.contract import EngineContract, admit
from tests.engines.contract_prompts import PromptContract
from tests.engines.test_llamacpp import TEXTS, logits_of, make, model_file, ways
from tests.engines.unrounded import make_llamacpp
from tests.heavy.tiny_gguf import tiny_llama_gguf

PART = 256
# What a type may change in a logit; measured: 0.9 with 16 and 8 bits, 1.9 with 5, 3.5 with 4.
ROUNDING = {"q5_1": 4.0, "q5_0": 4.0, "q4_1": 7.0, "q4_0": 7.0}


@pytest.fixture(scope="module")
def exact() -> Iterator[Engine]:
    engine = make(exact=1, cache="q8_0")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(exact: Engine) -> Tokenizer:
    return Tokenizer.from_str(exact.tokenizer_files()["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def plans(tokenizer: Tokenizer) -> dict[str, list[Plan]]:
    prompt = tokenizer.encode(" ".join(TEXTS * 3)).ids[:150]
    return ways(prompt, tokenizer.encode(TEXTS[2]).ids)


@pytest.fixture(scope="module")
def usual(plans: dict[str, list[Plan]]) -> NDArray[np.float32]:
    """The logits of exact mode with the usual cache."""
    engine = make(exact=1)
    try:
        return logits_of(engine, plans["whole"])
    finally:
        engine.close()


class TestContract(PromptContract, EngineContract):
    """Of exact mode, with numbers of 8 bits."""

    @pytest.fixture
    def engine(self, exact: Engine) -> Engine:
        exact.reset()
        return exact

    @pytest.fixture
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [(tokenizer.encode(text).ids * 2)[: 24 + 3 * n] for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize("way", list(ways([0] * 150, [0])))
def test_exact_mode_is_exact_with_numbers_of_8_bits(
    exact: Engine, plans: dict[str, list[Plan]], way: str
) -> None:
    assert (logits_of(exact, plans[way]) == logits_of(exact, plans["whole"])).all()


@pytest.mark.parametrize("layout", ["unified", "split"])
@pytest.mark.parametrize("cache", list(CACHE_TYPES))
def test_each_type_computes_nearly_the_same(
    cache: str, layout: str, plans: dict[str, list[Plan]], usual: NDArray[np.float32]
) -> None:
    prompt = list(plans["whole"][0].admits[0].tokens)
    shared = [
        Plan(admits=[admit(2, prompt)], work=[(2, len(prompt))]),
        Plan(admits=[admit(1, prompt, share_from=2, share_len=96)], work=[(1, len(prompt) - 96)]),
    ]
    engine = make_llamacpp(model_file(), "cpu", 12 * PART, cache=cache, kv=layout)
    try:
        off = np.abs(logits_of(engine, shared) - usual).max()
    finally:
        engine.close()
    assert off < ROUNDING.get(cache, 2.0)


def test_the_type_is_that_of_keys_and_values(
    exact: Engine, plans: dict[str, list[Plan]], usual: NDArray[np.float32]
) -> None:
    """In exact mode nothing else makes a difference."""
    assert (logits_of(exact, plans["whole"]) != usual).any()


def test_sizes_follow_the_type() -> None:
    assert BLOCK_BYTES.keys() == CACHE_TYPES.keys()
    for name, kind in CACHE_TYPES.items():
        known = gguf.GGMLQuantizationType[name.upper()]
        assert known.value == kind
        numbers, size = gguf.GGML_QUANT_SIZES[known]
        assert BLOCK_BYTES[name] == size * BLOCK // numbers
    metadata = read_metadata(model_file())
    assert kv_bytes_per_token(metadata, "f32") == 2 * kv_bytes_per_token(metadata)
    assert kv_bytes_per_token(metadata, "q8_0") == kv_bytes_per_token(metadata) * 34 // 64
    room = [kv_tokens_default(metadata, 8192, 1 << 30, cache) for cache in ("f32", "f16", "q4_0")]
    assert room[0] < room[1] < room[2]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"cache": "q3"}, "cache=q3 is not one of f16, f32"),
        ({"cache": "q8_0", "flash": "off"}, "cache=q8_0 needs flash attention: leave flash=off"),
        ({"cache": "f32", "flash": "on"}, "cache=f32 is of no use with flash attention"),
        ({"cache": "f32", "exact": 1}, "cache=f32 is of no use with flash attention"),
    ],
)
def test_what_does_not_go_together_is_told(extra: dict[str, object], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        make(**extra)


def test_a_head_that_makes_no_blocks_is_told() -> None:
    with pytest.raises(ModelError, match=r"in q8_0: .*block size 32 does not divide") as caught:
        make_llamacpp(tiny_llama_gguf(head_dim=60), "cpu", cache="q8_0")
    assert "\n" not in str(caught.value)
