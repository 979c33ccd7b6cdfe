"""vLLM 0.11 and its Neuron plugin as they are, around a stand-in for NxD Inference, on the CPU.

Not in ``make check``: the plugin is on no index, and vLLM 0.11's packages take 9 GB. How to run it
is in ``docs/engines/neuron.md``.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.engines import load as load_engine
from shards.engines import neuron_vllm
from shards.engines.base import Engine, EngineLost, EngineOptions, Plan, SamplingParams
from shards.engines.neuron_compiled import VARIABLE
from tests.engines import test_neuron_vllm
from tests.engines.contract import admit, generate
from tests.engines.signatures.toy import logits
from tests.heavy.models import tiny_llama_folder
from tests.heavy.neuron_vllm import stand_in

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_llama_folder(), tmp_path_factory.mktemp("model") / "tiny"))


def make(folder: Path, patch: pytest.MonkeyPatch, cache: str) -> Engine:
    import vllm_neuron

    stand_in.install()
    (folder / "neuron0").touch()
    patch.setattr(vllm_neuron, "_is_neuron_dev", lambda: True)
    patch.setattr(neuron_vllm, "DEVICES", folder)
    patch.delenv(VARIABLE, raising=False)
    extra = {"library": "vllm", "length_max": str(LENGTH), "prefix_cache": cache}
    options = EngineOptions(
        folder,
        "tiny",
        kv_tokens=1024,
        sequences_max=8,
        step_tokens_max=256,
        extra=tuple(extra.items()),
    )
    return load_engine("neuron", options, lambda _fraction: None)


@pytest.fixture(scope="module", params=["off", "on"])
def started(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        made = make(folder, patch, request.param)
        yield made
        made.close()


@pytest.fixture
def engine(started: Engine) -> Iterator[Engine]:
    started.reset()
    stand_in.Model.log.clear()
    yield started
    stand_in.Model.fault = ""


@pytest.fixture
def prompts() -> list[list[int]]:
    return [list(range(10 * n, 10 * n + 22 + n)) for n in range(1, 5)]


class TestContract(test_neuron_vllm.TestContract):
    """As over the fake."""


def test_greedy_tokens_are_the_models(engine: Engine) -> None:
    known = [5, 6, 7, 8]
    for _ in range(40):
        known.append(int(logits(known).argmax()))
    assert generate(engine, 1, known[:4], 40) == known[4:]


def test_each_is_as_alone_while_others_come_and_go(
    engine: Engine, prompts: list[list[int]]
) -> None:
    alone = [generate(engine, n, prompt, 30) for n, prompt in enumerate(prompts, start=1)]
    engine.reset()
    for turn in range(1, 6):
        drawn: dict[int, list[int]] = {10 * turn + n: [] for n in range(4)}
        numbers = list(drawn)
        plans = [
            Plan(
                admits=[admit(number, prompts[n])],
                work=[*((other, 1) for other in numbers[:n]), (number, len(prompts[n]))],
            )
            for n, number in enumerate(numbers)
        ]
        plans += [Plan(work=[(number, 1) for number in numbers])] * 12
        for plan in plans:
            outcome = engine.step(plan)
            for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
                drawn[sequence].append(token)
        engine.step(Plan(drops=numbers))
        for n, number in enumerate(numbers):
            assert drawn[number] == alone[n][: len(drawn[number])]


def test_the_longest_sequence_draws_its_last_token(engine: Engine) -> None:
    length = engine.describe().length_max
    known = [n % 200 for n in range(length)]
    for begin in range(0, length, 256):
        work = [(1, min(256, length - begin))]
        outcome = engine.step(Plan(admits=[] if begin else [admit(1, known)], work=work))
    assert outcome.tokens == [int(logits(known).argmax())]


test_logprobs_are_raw_and_natural = test_neuron_vllm.test_logprobs_are_raw_and_natural
test_what_it_would_pass_over_is_refused_for_that_sequence_alone = (
    test_neuron_vllm.test_what_it_would_pass_over_is_refused_for_that_sequence_alone
)


def test_what_was_compiled_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder, monkeypatch, "off").close()
    stand_in.Model.log.clear()
    make(folder, monkeypatch, "off").close()
    assert "load" in stand_in.Model.log
    assert "compile" not in stand_in.Model.log


def test_a_graph_that_fails_loses_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = make(folder, monkeypatch, "off")
    generate(engine, 1, [1, 2, 3], 1)
    monkeypatch.setattr(stand_in.Model, "fault", "NRT_EXEC_HW_ERR")
    with pytest.raises(EngineLost, match="neuron failed: RuntimeError: NRT_EXEC_HW_ERR"):
        generate(engine, 2, [1, 2, 3], 1)
    engine.close()


@pytest.mark.parametrize(
    "more", [{"seed": 1}, {"min_p": 1.0}, {"logit_bias": {200: 100.0}}], ids=str
)
def test_why_it_is_not_offered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """The plugin leaves it out without a word. A release that has it fails here."""
    backend = engine._backend  # type: ignore[attr-defined]
    plain = backend._sampling
    monkeypatch.setattr(backend, "_sampling", lambda ask: {**plain(ask), **more})
    hot = SamplingParams(temperature=50.0)
    drawn = [generate(engine, n, [1, 2, 3], 6, hot) for n in range(1, 4)]
    # A seed would make them equal, and so would min_p; the bias would leave one token.
    assert len({tuple(tokens) for tokens in drawn}) > 1
    assert {token for tokens in drawn for token in tokens} != {200}
