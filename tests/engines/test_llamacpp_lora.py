"""LoRA adapters on llama.cpp: what a sequence draws depends on its own adapter and on nothing else.

All in exact mode, where equal means equal bit for bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from shards.engines import load
from shards.engines.base import Admit, Engine, EngineOptions, ModelError, Plan, PlanError
from tests.engines.contract import admit, generate
from tests.engines.lora import write_adapter
from tests.engines.test_llamacpp import TEXTS, model_file

STEPS = 8
Adapters = tuple[tuple[str, Path], ...]


def make(adapters: Adapters) -> Engine:
    options = EngineOptions(
        model_file(),
        "smollm2",
        kv_tokens=1024,
        sequences_max=12,
        step_tokens_max=256,
        adapters=adapters,
        extra=(("exact", "1"),),
    )
    return load("llamacpp", options, lambda _fraction: None)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "inside").mkdir()
    adapters = (
        ("none", write_adapter(folder / "none.gguf", 0.0)),
        ("verse", write_adapter(folder / "verse.gguf", 2.0)),
        ("prose", write_adapter(folder / "inside" / "prose.gguf", 2.0, seed=2).parent),
    )
    engine = make(adapters)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
    return [tokenizer.encode(text).ids for text in TEXTS]


def adapted(sequence: int, prompt: list[int], adapter: str, **more: int) -> Admit:
    return replace(admit(sequence, prompt, **more), adapter=adapter)


def alone(engine: Engine, prompt: list[int], adapter: str) -> list[int]:
    """What the sequence draws when there is no other."""
    engine.reset()
    return together(engine, [(prompt, adapter)])[0]


def together(engine: Engine, asks: list[tuple[list[int], str]]) -> list[list[int]]:
    """What sequences draw that are computed in the same steps."""
    admits = [adapted(n, prompt, adapter) for n, (prompt, adapter) in enumerate(asks)]
    plan = Plan(admits=admits, work=[(n, len(prompt)) for n, (prompt, _) in enumerate(asks)])
    drawn: list[list[int]] = [[] for _ in asks]
    for _ in range(STEPS):
        outcome = engine.step(plan)
        # Rows keep the order of the plan, whatever was computed first.
        assert outcome.sequences == [n for n, _ in plan.work]
        for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[sequence].append(token)
        plan = Plan(work=[(n, 1) for n in reversed(range(len(asks)))])
    return drawn


def test_says_which_adapters_it_has(engine: Engine) -> None:
    info = engine.describe()
    assert info.adapters == ("none", "verse", "prose")
    assert "lora" in info.features


def test_an_adapter_of_zeros_changes_nothing_and_a_strong_one_the_answer(
    engine: Engine, prompts: list[list[int]]
) -> None:
    base = alone(engine, prompts[0], "")
    engine.reset()
    assert generate(engine, 1, prompts[0], STEPS) == base
    assert alone(engine, prompts[0], "none") == base
    verse, prose = alone(engine, prompts[0], "verse"), alone(engine, prompts[0], "prose")
    assert base != verse != prose != base


def test_each_sequence_of_a_mixed_batch_draws_what_it_draws_alone(
    engine: Engine, prompts: list[list[int]]
) -> None:
    asks = [
        (prompts[0], ""),
        (prompts[0], "verse"),
        (prompts[1], "prose"),
        (prompts[2], ""),
        (prompts[3], "verse"),
        (prompts[0], "prose"),
    ]
    expected = [alone(engine, prompt, adapter) for prompt, adapter in asks]
    engine.reset()
    assert together(engine, asks) == expected


def test_sequences_with_one_adapter_share_their_beginning(
    engine: Engine, prompts: list[list[int]]
) -> None:
    prompt = prompts[0]
    expected = alone(engine, prompt, "verse")
    engine.reset()
    engine.step(Plan(admits=[adapted(1, prompt, "verse")], work=[(1, len(prompt))]))
    heir = adapted(2, prompt, "verse", share_from=1, share_len=len(prompt) - 2)
    outcome = engine.step(Plan(admits=[heir], work=[(2, 2)]))
    assert outcome.tokens == expected[:1]


@pytest.mark.parametrize(("donor", "heir"), [("", "verse"), ("verse", ""), ("verse", "prose")])
def test_sequences_with_different_adapters_do_not(
    engine: Engine, prompts: list[list[int]], donor: str, heir: str
) -> None:
    prompt = prompts[0]
    engine.reset()
    engine.step(Plan(admits=[adapted(1, prompt, donor)], work=[(1, len(prompt))]))
    wrong = Plan(admits=[adapted(2, prompt, heir, share_from=1, share_len=8)], work=[(2, 1)])
    with pytest.raises(PlanError, match="different adapters"):
        engine.step(wrong)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("missing", "does not exist"),
        ("folder", "holds 0 GGUF files"),
        ("text", "llama.cpp cannot load"),
        ("another model", "incorrect shape"),
        ("another architecture", "arch mismatch"),
        ("another kind", "expect adapter.type to be 'lora'"),
        ("one half", "is missing one component"),
        ("the model", "expect general.type to be 'adapter'"),
    ],
)
def test_a_faulty_adapter_is_named_in_one_line(tmp_path: Path, case: str, reason: str) -> None:
    path = tmp_path / "adapter.gguf"
    match case:
        case "folder":
            path.mkdir()
        case "text":
            path.write_text("This is no adapter.")
        case "another model":
            write_adapter(path, 1.0, width=64)
        case "another architecture":
            write_adapter(path, 1.0, arch="gemma")
        case "another kind":
            write_adapter(path, 1.0, kind="vector")
        case "one half":
            write_adapter(path, 1.0, leave_out=".lora_b")
        case "the model":
            path = model_file()
    with pytest.raises(ModelError, match=reason) as caught:
        make((("verse", path),))
    assert str(caught.value).startswith("adapter verse: ")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", 1.0)
    with pytest.raises(ModelError, match="two adapters are called verse"):
        make((("verse", path), ("verse", path)))


def test_an_engine_without_adapters_refuses_them(tmp_path: Path) -> None:
    options = EngineOptions(None, "m", adapters=(("verse", tmp_path),))
    with pytest.raises(ModelError, match="scripted has no LoRA adapters here: leave out --adapter"):
        load("scripted", options, lambda _fraction: None)
