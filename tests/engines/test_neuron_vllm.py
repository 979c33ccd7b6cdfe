"""Neuron through vLLM, against a fake of exactly the recorded signatures.

Which those are: ``test_neuron_signatures.py``. What the fake is:
``signatures/fake_vllm_neuron.py``. What cannot be checked without a device is said in
``docs/engines/neuron.md``.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.engines import ENGINES
from shards.engines import load as load_engine
from shards.engines import neuron_vllm
from shards.engines.base import (
    Engine,
    EngineLost,
    EngineOptions,
    ModelError,
    Plan,
    PlanError,
    SamplingParams,
    Scheduling,
)
from shards.engines.neuron_compiled import CONFIG, VARIABLE
from tests.engines.contract import EngineContract, admit, decode, generate
from tests.engines.driving import until
from tests.engines.signatures import fake_vllm_neuron
from tests.engines.signatures.strict import installed
from tests.engines.signatures.toy import logits
from tests.heavy.models import tiny_llama_folder

EXTRAS = ("tp", "length_max", "prefix_cache", "compiled", "lease_tokens", "answer_s", "library")


def make(**given: Any) -> Engine:
    given = {"library": "vllm", "length_max": 512, **given}
    extra = {key: str(given.pop(key)) for key in list(given) if key in EXTRAS}
    options = EngineOptions(
        given.pop("model", tiny_llama_folder()),
        "tiny",
        **{"kv_tokens": 1024, "sequences_max": 8, "step_tokens_max": 256, **given},
        extra=tuple(extra.items()),
    )
    return load_engine("neuron", options, lambda _fraction: None)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    fake_vllm_neuron.LLMEngine.made.clear()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "neuron0").touch()
    monkeypatch.setattr(neuron_vllm, "DEVICES", tmp_path / "dev")
    before = dict(os.environ)
    modules = fake_vllm_neuron.modules()
    with installed(**modules):
        yield modules
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make()
    yield made
    made.close()


@pytest.fixture
def prompts() -> list[list[int]]:
    return [list(range(10 * n, 10 * n + 22 + n)) for n in range(1, 5)]


def fake() -> fake_vllm_neuron.LLMEngine:
    return fake_vllm_neuron.LLMEngine.made[-1]


class TestContract(EngineContract):
    """The suite without what the plugin has no word for, and the router is told so.

    Each sequence has a slot of its own, so prefixes are not shared by plan; what a step computes is
    the plugin's affair; it makes no generator for a seed and no processor for a bias.
    """

    test_shared_prefix_is_as_computed = None
    test_generated_tokens_can_be_shared = None
    test_steps_that_overlap_are_as_one_after_the_other = None
    test_kv_budget_counts_shared_tokens_once = None
    test_goes_on_beside_others_and_from_a_shared_prefix = None
    test_penalties_go_on_anywhere = None
    test_penalties_see_generated_tokens_only = None
    test_bias_decides = None
    test_logprobs_are_raw_and_natural = None  # uses a penalty; see below
    test_same_log_same_tokens = None  # uses a seed; see below
    test_a_seed_decides = None

    def test_goes_on_anywhere(self, engine: Engine, prompts: list[list[int]]) -> None:  # type: ignore[override]
        EngineContract.test_goes_on_anywhere(self, engine, prompts, SamplingParams())


def test_same_log_same_tokens_without_chance(engine: Engine, prompts: list[list[int]]) -> None:
    def run() -> list[list[int]]:
        engine.reset()
        return [generate(engine, n, prompt, 6) for n, prompt in enumerate(prompts, start=1)]

    assert run() == run()


# What it says of itself, and asks of the engine ---------------------------------------------------


def test_describes_what_is_true() -> None:
    engine = make(kv_tokens=0, step_tokens_max=0)
    info = engine.describe()
    assert info.scheduling is Scheduling.SELF
    assert (info.engine, info.device, info.page_tokens) == ("neuron", "neuron", 1)
    assert (info.sequences_max, info.length_max, info.kv_tokens) == (8, 511, 8 * 511)
    assert info.features == ("logprobs", "min_tokens")
    assert set(info.features) < set(ENGINES["neuron"].features)
    given = fake().arguments
    assert (given.max_num_seqs, given.max_model_len, given.tensor_parallel_size) == (8, 512, 1)
    assert (given.enable_prefix_caching, given.num_gpu_blocks_override) == (False, 8)
    override = given.additional_config["override_neuron_config"]
    assert override == {"on_device_sampling_config": None, "save_sharded_checkpoint": True}
    assert given.skip_tokenizer_init is True
    assert given.trust_remote_code is None
    engine.close()
    assert fake().engine_core.shut_down == 1


def test_sizes_and_cores_are_passed_on() -> None:
    engine = make(tp=2, dtype="bfloat16", prefix_cache="on", sequences_max=4, kv_tokens=100)
    given = fake().arguments
    assert (given.tensor_parallel_size, given.dtype) == (2, "bfloat16")
    assert (given.block_size, given.num_gpu_blocks_override) == (32, 4 * 16)
    assert (engine.describe().kv_tokens, engine.describe().length_max) == (100, 100)
    engine.close()


def test_the_longest_sequence_fits_and_draws_its_last_token(engine: Engine) -> None:
    length = engine.describe().length_max
    made = admit(1, [n % 200 for n in range(length)])
    for begin in range(0, length, 256):
        work = [(1, min(256, length - begin))]
        outcome = engine.step(Plan(admits=[made] if not begin else [], work=work))
    assert outcome.sequences == [1]
    assert fake().given[-1].max_tokens == 1


def test_a_sequence_is_one_request_unless_leases_are_asked_for(prompts: list[list[int]]) -> None:
    answers = []
    for lease in ({}, {"lease_tokens": 7}):
        engine = make(**lease)
        answers.append(generate(engine, 1, prompts[0], 20))
        # The first is the trial at the start.
        counts = [params.max_tokens for params in fake().given[1:]]
        assert counts == ([7, 7, 7] if lease else [512 - len(prompts[0])])
        engine.close()
    assert answers[0] == answers[1]


def test_each_prompt_is_computed_alone_and_decodes_together(
    engine: Engine, prompts: list[list[int]]
) -> None:
    numbers = range(1, 5)
    admits = [admit(n, prompts[n - 1]) for n in numbers]
    engine.step(Plan(admits=admits, work=[(n, len(prompts[n - 1])) for n in numbers]))
    for _ in range(5):
        assert engine.step(Plan(work=[(n, 1) for n in numbers])).sequences == list(numbers)
    turns = [len(turn) for turn in fake().steps[1:]]
    assert turns[:4] == [1, 1, 1, 1]
    assert set(turns[4:9]) == {4}


def test_temperature_and_filters_are_passed_on(engine: Engine) -> None:
    sampling = SamplingParams(temperature=3.0, top_k=5, top_p=0.5)
    drawn = {tuple(generate(engine, n, [1, 2, 3], 4, sampling)) for n in range(1, 6)}
    assert len(drawn) > 1
    given = fake().given[-1]
    assert (given.temperature, given.top_k, given.top_p) == (3.0, 5, 0.5)
    assert (given.ignore_eos, given.detokenize, given.logprobs) == (True, False, None)


def test_logprobs_are_raw_and_natural(engine: Engine) -> None:
    prompt = [5, 6, 7, 8]
    raw = logits(prompt).astype(float)
    raw -= math.log(sum(math.exp(value) for value in raw))
    for top in (0, 3):
        engine.reset()
        sampling = SamplingParams(temperature=2.0, top_k=5, logprobs=True, top_logprobs=top)
        outcome = engine.step(Plan(admits=[admit(1, prompt, sampling)], work=[(1, 4)]))
        found = outcome.logprobs[1]
        assert found.logprob == pytest.approx(raw[outcome.tokens[0]], abs=1e-4)
        assert list(found.top_values) == pytest.approx(sorted(raw, reverse=True)[:top], abs=1e-4)
        assert list(found.top_tokens) == [int(token) for token in (-raw).argsort()[:top]]


def test_what_it_would_pass_over_is_refused_for_that_sequence_alone(engine: Engine) -> None:
    cases = {
        1: (SamplingParams(temperature=1.0, min_p=0.1), "does not support min_p"),
        2: (SamplingParams(temperature=0.001), "temperature 0, or 0.01 and above"),
        3: (SamplingParams(), "prompts of 3 tokens or more only"),
    }
    tokens = {1: [1, 5, 5], 2: [2, 5, 5], 3: [3, 5]}
    admits = [admit(n, tokens[n], sampling) for n, (sampling, _) in cases.items()]
    work = [(n, len(tokens[n])) for n in cases]
    outcome = engine.step(Plan(admits=[*admits, admit(4, [4, 5, 5])], work=[*work, (4, 3)]))
    assert outcome.sequences == [4]
    for n, (_, message) in cases.items():
        assert message in outcome.failures[n]


def test_a_feature_that_is_not_offered_is_refused(engine: Engine) -> None:
    for sampling, word in (
        (SamplingParams(frequency_penalty=1.0), "penalties"),
        (SamplingParams(logit_bias=((1, 1.0),)), "logit_bias"),
        (SamplingParams(ranks=True), "ranks"),
    ):
        with pytest.raises(PlanError, match=f"neuron does not support {word}"):
            engine.step(Plan(admits=[admit(1, [1, 2, 3], sampling)]))


# Ends and faults ----------------------------------------------------------------------------------


def test_a_drop_aborts_the_request(engine: Engine) -> None:
    fake().open.clear()
    engine.step(Plan(admits=[admit(1, [1, 2, 3])], work=[(1, 1)]))
    # It is asked for, and a step of it is under way.
    until(lambda: len(fake().given) == 2)
    engine.step(Plan(drops=[1]))
    fake().open.set()
    until(lambda: fake().aborted == ["roundhouse-1"])
    assert not fake().waiting + fake().running


def test_a_reset_aborts_all_and_the_next_step_is_as_new(
    engine: Engine, prompts: list[list[int]]
) -> None:
    whole = generate(engine, 1, prompts[0], 5)
    generate(engine, 2, prompts[1], 2)
    engine.reset()
    assert not fake().waiting + fake().running
    assert generate(engine, 1, prompts[0], 5) == whole


def test_a_request_that_is_refused_fails_alone(engine: Engine) -> None:
    fake().arguments.max_model_len = 20
    admits = [admit(1, list(range(30))), admit(2, [1, 2, 3])]
    outcome = engine.step(Plan(admits=admits, work=[(1, 30), (2, 3)]))
    assert outcome.failures[1].startswith("vLLM refused the request: The decoder prompt")
    assert outcome.sequences == [2]
    assert len(decode(engine, 2, 3)) == 3


def test_a_step_that_fails_loses_the_engine(engine: Engine) -> None:
    generate(engine, 1, [1, 2, 3], 1)
    fake().fault = "NRT_EXEC_HW_ERR"
    with pytest.raises(EngineLost, match="neuron failed: RuntimeError: NRT_EXEC_HW_ERR"):
        generate(engine, 2, [1, 2, 3], 1)
    with pytest.raises(EngineLost):
        engine.step(Plan())


def test_a_step_that_hangs_is_given_up() -> None:
    engine = make(answer_s=0.2)
    try:
        fake().open.clear()
        with pytest.raises(EngineLost, match=r"no token for 1 sequences.*within 0\.2 s"):
            generate(engine, 1, [1, 2, 3], 1)
    finally:
        fake().open.set()
        engine.close()


# What was compiled --------------------------------------------------------------------------------


def test_each_choice_of_sizes_has_a_folder_of_its_own_and_keeps_it() -> None:
    def folder(**given: Any) -> Path:
        os.environ.pop(VARIABLE, None)
        make(**given).close()
        return Path(fake().compiled)

    first = folder()
    assert first.parent == tiny_llama_folder() / "neuron-compiled-artifacts"
    assert folder() == first
    changed = ({"sequences_max": 4}, {"length_max": 256}, {"tp": 2}, {"dtype": "float32"})
    assert len({first, *(folder(**one) for one in changed)}) == 5


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"batch_size": 4}, "batch_size 4, and --sequences-max asks for 8"),
        ({"seq_len": 64}, "seq_len 64, and --engine-option length_max= asks for 512"),
        ({"tp_degree": 2}, "tp_degree 2, and --engine-option tp= asks for 1"),
        ({"is_prefix_caching": True}, "prefix_caching True, and .*prefix_cache= asks for False"),
        ({"on_device_sampling_config": {"dynamic": True}}, "compiled to draw on the device"),
        (None, "lacks 'neuron_config'"),
    ],
)
def test_a_folder_that_was_compiled_otherwise_is_one_clear_line(
    tmp_path: Path, found: dict[str, Any] | None, message: str
) -> None:
    fits = {"batch_size": 8, "seq_len": 512, "tp_degree": 1, "is_prefix_caching": False}
    config = {} if found is None else {"neuron_config": {**fits, **found}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as told:
        make(compiled=tmp_path)
    assert "\n" not in str(told.value)
    (tmp_path / CONFIG).write_text(json.dumps({"neuron_config": fits}))
    make(compiled=tmp_path).close()
    assert fake().compiled == str(tmp_path)


def test_what_draws_on_the_device_all_the_same_is_found_by_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake_vllm_neuron.LLMEngine, "draws_on_device", True)
    with pytest.raises(ModelError, match="draws on the device; name another folder"):
        make()
    assert fake().engine_core.shut_down == 1


# When it is not there -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vllm", "vllm_neuron"])
def test_a_missing_package_is_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Undone before the fake packages go.
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        with pytest.raises(ModelError, match=f"needs the package {name}: see docs/engines") as told:
            make()
    assert "\n" not in str(told.value)


def test_a_missing_device_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "dev" / "neuron0").unlink()
    with pytest.raises(ModelError, match=r"^neuron: no Neuron device"):
        make()


def test_a_plugin_that_is_not_taken_is_one_clear_line() -> None:
    with (
        installed(**fake_vllm_neuron.modules(taken=False)),
        pytest.raises(ModelError, match="did not take its Neuron plugin: leave VLLM_PLUGINS out"),
    ):
        make()


def test_a_failed_start_is_one_clear_line(package: dict[str, Any]) -> None:
    package["vllm"].LLMEngine.broken = "Compilation failed\nTraceback ..."
    with pytest.raises(ModelError, match=r"^neuron: vLLM did not start: Compilation failed$"):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world": 2}, "--engine-option tp=N"),
        ({"adapters": (("poet", Path("x")),)}, "LoRA adapters are not served"),
        ({"device": "cpu"}, "--device cpu: NEURON_RT_VISIBLE_CORES names the cores"),
        ({"length_max": 4096}, "length_max=4096 must be more than 3 and at most 2048"),
        ({"length_max": 3}, "length_max=3 must be more than 3"),
        ({"length_max": 100, "prefix_cache": "on"}, "must be a multiple of 32; 100 is not"),
        ({"sequences_max": 1, "prefix_cache": "on"}, "needs --sequences-max 2 or more"),
        ({"library": "optimum", "tp": 2}, "unknown engine option"),
    ],
)
def test_a_faulty_option_is_one_clear_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as told:
        make(**given)
    assert "\n" not in str(told.value)


def test_another_release_of_vllm_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    releases = {"vllm": "0.24.1", "vllm-neuron": "0.9.0"}
    monkeypatch.setattr(neuron_vllm, "installed_version", lambda name: releases[name])
    engine = make()
    assert engine.describe().engine_version == "0.9.0"
    assert engine.describe().warnings[0].startswith("vLLM 0.24.1 is installed")
    engine.close()
