"""Embeddings on llama.cpp: what the vectors are like, and that generation does not notice them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from shards.engines import load
from shards.engines.base import Engine, EngineOptions, FeatureError, ModelError, Plan
from shards.engines.llama_embed import (
    EMBED_TURN_TOKENS,
    EmbeddingContext,
    Part,
    is_causal,
    pooling_of,
    turns_of,
)
from tests.engines.contract import admit, decode, generate
from tests.engines.lora import write_adapter
from tests.engines.test_llamacpp import TEXTS, model_file

WIDTH = 576


def make(adapters: tuple[tuple[str, Path], ...] = (), **extra: object) -> Engine:
    options = EngineOptions(
        model_file(),
        "smollm2",
        kv_tokens=1024,
        sequences_max=4,
        step_tokens_max=256,
        adapters=adapters,
        extra=tuple((key, str(value)) for key, value in extra.items()),
    )
    return load("llamacpp", options, lambda _fraction: None)


@pytest.fixture(scope="module")
def mean() -> Iterator[Engine]:
    engine = make(exact=1, embeddings=1, embed_tokens=128, pooling="mean")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(mean: Engine) -> Tokenizer:
    return Tokenizer.from_str(mean.tokenizer_files()["tokenizer.json"].decode())


def vectors(engine: Engine, inputs: list[list[int]]) -> np.ndarray:
    return np.array(engine.embed(inputs), np.float32)


def test_says_what_it_can_embed(mean: Engine) -> None:
    info = mean.describe()
    assert "embeddings" in info.features
    assert info.embed_tokens_max == 128


def test_vectors_have_length_1_and_do_not_depend_on_their_neighbours(
    mean: Engine, tokenizer: Tokenizer
) -> None:
    inputs = [tokenizer.encode(text).ids for text in TEXTS]
    found = vectors(mean, inputs)
    assert found.shape == (len(TEXTS), WIDTH)
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    for ids, vector in zip(inputs, found, strict=True):
        assert vectors(mean, [ids])[0] @ vector > 0.9999
    reordered = vectors(mean, inputs[::-1])[::-1]
    assert np.sum(reordered * found, axis=1).min() > 0.9999


def test_texts_of_one_subject_are_nearer_than_those_of_different_ones(
    mean: Engine, tokenizer: Tokenizer
) -> None:
    subjects = [
        (
            "The cat sleeps on the warm sofa in the living room.",
            "A kitten is napping on the couch in the living room.",
        ),
        (
            "The central bank raised interest rates to fight inflation.",
            "Interest rates were increased by the bank because of inflation.",
        ),
        (
            "def add(a, b):\n    return a + b",
            "def subtract(a, b):\n    return a - b",
        ),
    ]
    left, right = (
        vectors(mean, [tokenizer.encode(pair[side]).ids for pair in subjects]) for side in (0, 1)
    )
    nearest = (left @ right.T).argmax(axis=1)
    assert nearest.tolist() == [0, 1, 2]


def test_more_inputs_than_the_context_has_sequences(mean: Engine) -> None:
    inputs = [[100 + n] for n in range(100)]
    found = vectors(mean, inputs)
    assert found.shape == (100, WIDTH)
    assert vectors(mean, [inputs[90]])[0] @ found[90] > 0.9999
    assert found[90] @ found[10] < 0.9999


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_long_inputs_are_embedded_in_turns_with_the_same_result(
    pooling: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams wait for one turn, not for a batch; what comes out is as if it were done at once."""
    computed: list[int] = []
    compute = EmbeddingContext._compute

    def counted(self: EmbeddingContext, inputs: object, parts: list[Part]) -> None:
        computed.append(sum(part.end - part.begin for part in parts))
        compute(self, inputs, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddingContext, "_compute", counted)
    text = tokenizer.encode(" ".join(TEXTS)).ids
    inputs = [(text * 20)[:200], text[:9], (text[::-1] * 20)[:150]]
    engine = make(embeddings=1, pooling=pooling)
    try:
        assert next(engine.embedding(inputs)) is None  # and given up, as when a client leaves
        computed.clear()
        *before, found = engine.embedding(inputs)
        assert before == [None] * 5
        assert computed == [EMBED_TURN_TOKENS] * 5 + [359 - 5 * EMBED_TURN_TOKENS]
    finally:
        engine.close()
    monkeypatch.setattr("shards.engines.llama_embed.EMBED_TURN_TOKENS", 512)
    engine = make(embeddings=1, pooling=pooling)
    try:
        (whole,) = engine.embedding(inputs)
    finally:
        engine.close()
    assert computed[-1] == 359
    assert np.sum(np.array(found) * np.array(whole), axis=1).min() > 0.999


@pytest.mark.parametrize(
    ("lengths", "splits", "turns"),
    [
        ([64], True, [[(0, 0, 64)]]),
        ([65], True, [[(0, 0, 64)], [(0, 64, 65)]]),
        ([65], False, [[(0, 0, 65)]]),
        ([40, 40], True, [[(0, 0, 40), (1, 0, 24)], [(1, 24, 40)]]),
        ([40, 40], False, [[(0, 0, 40)], [(1, 0, 40)]]),
        ([10, 500, 10], False, [[(0, 0, 10)], [(1, 0, 500)], [(2, 0, 10)]]),
        ([1, 1, 1, 1], True, [[(0, 0, 1), (1, 0, 1), (2, 0, 1)], [(3, 0, 1)]]),
    ],
)
def test_what_is_embedded_at_once(
    lengths: list[int], splits: bool, turns: list[list[tuple[int, int, int]]]
) -> None:
    expected = [[Part(*part) for part in parts] for parts in turns]
    assert list(turns_of(lengths, 3, splits=splits)) == expected


def test_inputs_are_cut_only_where_tokens_see_what_is_before_them() -> None:
    metadata = {"general.architecture": "qwen3"}
    assert is_causal(metadata)
    assert not is_causal({"general.architecture": "bert", "bert.attention.causal": False})


def test_generation_does_not_notice(mean: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXTS[0]).ids
    mean.reset()
    expected = generate(mean, 1, prompt, 6)
    mean.reset()
    drawn = mean.step(Plan(admits=[admit(1, prompt)], work=[(1, len(prompt))])).tokens
    for _ in range(5):
        mean.embed([prompt, prompt[:3]])
        drawn += decode(mean, 1, 1)
    assert drawn == expected


def test_the_last_token_stands_for_the_input_where_the_file_says_nothing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """And a vector is the model's own, whatever adapter generation uses."""
    adapters = (("verse", write_adapter(tmp_path / "verse.gguf", 2.0)),)
    default, last = make(adapters, embeddings=1), make(embeddings=1, pooling="last")
    first = make(embeddings=1, pooling="first")
    ids = tokenizer.encode(TEXTS[0]).ids
    try:
        assert default.describe().embed_tokens_max == 512
        expected = vectors(last, [ids])
        default.step(Plan(admits=[admit(1, ids)], work=[(1, len(ids))]))
        assert (vectors(default, [ids]) == expected).all()
        # The state of the first token knows nothing of the others.
        assert np.allclose(vectors(first, [ids]), vectors(first, [ids[:1]]), atol=1e-4)
        assert not np.allclose(expected, vectors(last, [ids[:1]]), atol=1e-2)
    finally:
        for engine in (default, last, first):
            engine.close()


def test_without_the_option_it_refuses_by_name() -> None:
    engine = make()
    try:
        assert "embeddings" not in engine.describe().features
        with pytest.raises(FeatureError, match="engine llamacpp does not support embeddings"):
            engine.embed([[1, 2]])
    finally:
        engine.close()


@pytest.mark.parametrize(("kind", "pooling"), [(None, 3), (-1, 3), (0, 3), (1, 1), (2, 2), (3, 3)])
def test_the_file_says_how_to_pool(kind: int | None, pooling: int) -> None:
    metadata = {"general.architecture": "llama"}
    if kind is not None:
        metadata["llama.pooling_type"] = kind
    assert pooling_of(Path("m.gguf"), metadata) == pooling


def test_a_model_made_to_rank_is_refused() -> None:
    metadata = {"general.architecture": "llama", "llama.pooling_type": 4}
    with pytest.raises(ModelError, match="made to rank"):
        pooling_of(Path("m.gguf"), metadata)


def test_no_room_for_embeddings_is_refused() -> None:
    with pytest.raises(ModelError, match="embed_tokens must be at least 1"):
        make(embeddings=1, embed_tokens=0)
