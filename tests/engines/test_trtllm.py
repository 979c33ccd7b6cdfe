"""TensorRT-LLM's adapter: against the recorded signature, and against a fake of exactly that one.

What the fake is: ``signatures/fake_trtllm.py``. What cannot be checked without a device is said in
``docs/engines/trtllm.md``.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.engines import ENGINES
from shards.engines import load as load_engine
from shards.engines.base import (
    Admit,
    Engine,
    EngineLost,
    EngineOptions,
    ModelError,
    Plan,
    PlanError,
    SamplingParams,
    Scheduling,
)
from tests.engines.contract import EngineContract, admit, decode, generate
from tests.engines.driving import until
from tests.engines.signatures import fake_trtllm
from tests.engines.signatures.record import load as load_recorded
from tests.engines.signatures.strict import fields, installed, recorded
from tests.engines.signatures.toy import logits
from tests.engines.signatures.uses import call_keywords, keys_of, names_read
from tests.heavy.models import tiny_llama_folder

ADAPTER = "trtllm"
EXTRAS = ("tp", "lease_tokens", "answer_s", "length_max", "memory_share", "logprobs")


def make(**given: Any) -> Engine:
    extra = {key: str(given.pop(key)) for key in list(given) if key in EXTRAS}
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        **{"kv_tokens": 1024, "sequences_max": 8, "step_tokens_max": 256, **given},
        extra=tuple(extra.items()),
    )
    return load_engine("trtllm", options, lambda _fraction: None)


@pytest.fixture(autouse=True)
def package() -> Iterator[dict[str, Any]]:
    fake_trtllm.LLM.made.clear()
    modules = fake_trtllm.modules()
    with installed(**modules):
        yield modules


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make(logprobs=1)
    yield made
    made.close()


@pytest.fixture
def prompts() -> list[list[int]]:
    return [list(range(10 * n, 10 * n + 22 + n)) for n in range(1, 5)]


def fake() -> fake_trtllm.LLM:
    return fake_trtllm.LLM.made[-1]


class TestContract(EngineContract):
    """The suite without what TensorRT-LLM has no word for, and the router is told so.

    Prefixes are shared by its own cache, without a word of the router, and what a step computes is
    its own affair; a new lease would forget which tokens a penalty has seen; the draws of all
    requests come from one generator.
    """

    test_shared_prefix_is_as_computed = None
    test_generated_tokens_can_be_shared = None
    test_steps_that_overlap_are_as_one_after_the_other = None
    test_kv_budget_counts_shared_tokens_once = None
    test_goes_on_beside_others_and_from_a_shared_prefix = None
    test_penalties_go_on_anywhere = None
    test_penalties_see_generated_tokens_only = None
    test_logprobs_are_raw_and_natural = None  # uses a penalty; see below
    test_same_log_same_tokens = None  # uses a seed; see below
    test_a_seed_decides = None

    # Cases 6 and 7 share 16 and 8 tokens, which are no whole page here.
    @pytest.mark.parametrize("case", [0, 1, 2, 3, 4, 5, 8])
    def test_what_breaks_the_contract_is_refused(
        self, engine: Engine, prompts: list[list[int]], case: int
    ) -> None:
        EngineContract.test_what_breaks_the_contract_is_refused(self, engine, prompts, case)

    def test_goes_on_anywhere(self, engine: Engine, prompts: list[list[int]]) -> None:  # type: ignore[override]
        EngineContract.test_goes_on_anywhere(self, engine, prompts, SamplingParams())


def test_same_log_same_tokens_without_chance(engine: Engine, prompts: list[list[int]]) -> None:
    def run() -> list[list[int]]:
        engine.reset()
        return [generate(engine, n, prompt, 6) for n, prompt in enumerate(prompts, start=1)]

    assert run() == run()


# The recorded signature ---------------------------------------------------------------------------


def test_every_argument_and_field_is_in_the_recorded_signature() -> None:
    references = load_recorded("trtllm")["references"].values()
    stable = {name for one in references for name in one.get("parameters", ())}
    nested = {"max_tokens", "free_gpu_memory_fraction", "enable_block_reuse"}
    arguments = keys_of(ADAPTER, "_arguments")
    # All of the constructor's arguments are in the interface that the project keeps stable.
    assert arguments <= stable
    assert arguments <= set(fields("trtllm", "BaseLlmArgs", "TorchLlmArgs"))
    assert keys_of(ADAPTER, "_sampling") <= set(fields("trtllm", "SamplingParams")) & stable
    assert call_keywords(ADAPTER, "KvCacheConfig") == nested
    assert nested <= set(fields("trtllm", "KvCacheConfig"))
    assert call_keywords(ADAPTER, "LoraConfig") <= set(fields("trtllm", "LoraConfig"))
    assert call_keywords(ADAPTER, "LoRARequest") <= set(fields("trtllm", "LoRARequest"))
    called = call_keywords(ADAPTER, "generate_async")
    known = recorded("trtllm", "functions", "BaseLLM.generate_async")["positional"]
    assert called <= set(known)
    assert names_read(ADAPTER, "_llm") == {"generate_async", "shutdown"}
    assert names_read(ADAPTER, "output") <= set(fields("trtllm", "CompletionOutput"))
    for name in names_read(ADAPTER, "_llmapi"):
        assert recorded("trtllm", "names", name)
    for name in names_read(ADAPTER, "result"):
        assert name == "outputs" or recorded("trtllm", "functions", f"GenerationResult.{name}")


def test_an_argument_that_the_engine_does_not_have_is_noticed() -> None:
    with pytest.raises(ValueError, match="invalid argument"):
        fake_trtllm.LLM(model="x", no_such_argument=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fake_trtllm.SamplingParams(no_such_field=1)


# What it says of itself, and asks of the engine ---------------------------------------------------


def test_describes_what_is_true() -> None:
    engine = make()
    info = engine.describe()
    assert info.scheduling is Scheduling.SELF
    assert (info.kv_tokens, info.page_tokens, info.sequences_max) == (1024, 32, 8)
    assert set(info.features) == {"logit_bias", "min_tokens"}
    assert info.device == "Fake GPU"
    given = fake().arguments
    assert given["max_seq_len"] == info.length_max + 1 == 1025
    assert given["kv_cache_config"].max_tokens == 1024 + 8 * 128 + 8 * 32
    assert given["skip_tokenizer_init"] is True
    assert "trust_remote_code" not in given
    engine.close()
    assert fake().shut_down == 1


def test_the_table_of_engines_says_the_same(tmp_path: Path) -> None:
    facts = ENGINES["trtllm"]
    least, most = make(), make(logprobs=1, adapters=(("poet", tmp_path),))
    assert set(least.describe().features) == set(facts.features)
    assert set(most.describe().features) == {*facts.features, *facts.optional}
    least.close()
    most.close()


def test_ranks_adapters_and_sizes_are_passed_on(tmp_path: Path) -> None:
    engine = make(tp=2, adapters=(("poet", tmp_path),), dtype="bfloat16", length_max=99)
    given = fake().arguments
    assert (given["tensor_parallel_size"], given["dtype"]) == (2, "bfloat16")
    assert (given["enable_lora"], given["lora_config"].lora_dir) == (True, [str(tmp_path)])
    assert given["lora_config"].max_loras == given["lora_config"].max_cpu_loras == 1
    assert engine.describe().length_max == 99
    made = Admit(1, [1, 2, 3], 3, SamplingParams(), adapter="poet")
    plan = Plan(admits=[made, admit(2, [4, 5])], work=[(1, 3), (2, 2)])
    assert engine.step(plan).sequences == [1, 2]
    assert fake().loras[0].lora_path == str(tmp_path)
    assert fake().loras[0].lora_int_id == 1
    assert fake().loras[1] is None
    engine.close()


def test_temperature_without_filters_is_not_taken_for_greedy(engine: Engine) -> None:
    sampling = SamplingParams(temperature=3.0)
    drawn = {tuple(generate(engine, n, [1, 2, 3], 4, sampling)) for n in range(1, 6)}
    assert len(drawn) > 1


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


def test_a_logprob_that_is_not_reported_fails_the_sequence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_trtllm.LLM, "reports_drawn", False)
    greedy = SamplingParams(logprobs=True)
    assert len(generate(engine, 1, [1, 2], 3, greedy)) == 3
    warm = SamplingParams(temperature=50.0, logprobs=True)
    outcomes = [
        engine.step(Plan(admits=[admit(n, [n, 9], warm)], work=[(n, 2)])) for n in range(2, 8)
    ]
    failures = [text for outcome in outcomes for text in outcome.failures.values()]
    assert set(failures) == {"trtllm gave no log probability of the token it drew"}
    # They would go on for nobody.
    until(lambda: len(fake().toy.aborted) == len(failures))


def test_what_it_would_ignore_is_refused_for_that_sequence_alone(engine: Engine) -> None:
    cases = {
        1: (SamplingParams(temperature=1.0, min_p=0.1), "trtllm does not support min_p"),
        2: (SamplingParams(logprobs=True, logit_bias=((1, 1.0),)), "no raw log probabilities"),
    }
    admits = [admit(n, [n, 5], sampling) for n, (sampling, _) in cases.items()]
    plan = Plan(admits=[*admits, admit(3, [3, 5])], work=[(1, 2), (2, 2), (3, 2)])
    outcome = engine.step(plan)
    assert outcome.sequences == [3]
    for n, (_, message) in cases.items():
        assert message in outcome.failures[n]


def test_a_feature_that_was_not_offered_is_refused() -> None:
    engine = make()
    for sampling, word in (
        (SamplingParams(frequency_penalty=1.0), "penalties"),
        (SamplingParams(logprobs=True), "logprobs"),
    ):
        with pytest.raises(PlanError, match=f"trtllm does not support {word}"):
            engine.step(Plan(admits=[admit(1, [1, 2], sampling)]))
    engine.close()


# When it is not there -----------------------------------------------------------------------------


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", None)
    with pytest.raises(ModelError, match=r"needs the package tensorrt_llm.*docs/engines") as told:
        make()
    assert "\n" not in str(told.value)


def test_a_missing_device_is_one_clear_line() -> None:
    with (
        installed(torch=fake_trtllm.torch_module(gpu=False)),
        pytest.raises(ModelError, match=r"^trtllm: no NVIDIA GPU"),
    ):
        make()


def test_a_failed_start_is_one_clear_line(package: dict[str, Any]) -> None:
    package["tensorrt_llm__llmapi"].LLM.broken = "MPI could not be started\nTraceback ..."
    with pytest.raises(ModelError, match=r"^trtllm: did not start: MPI could not be started$"):
        make()


def test_a_start_that_fails_late_gives_the_memory_back(
    package: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_given: Any) -> None:
        raise ValueError("lora_path (poet) does not exist.")

    monkeypatch.setattr(package["tensorrt_llm__llmapi"], "LoRARequest", refuse)
    with pytest.raises(ModelError, match=r"^trtllm: did not start: lora_path \(poet\) does not"):
        make(adapters=(("poet", tmp_path),))
    assert fake().shut_down == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_tokens": 0}, "--kv-tokens N is needed"),
        ({"kv_tokens": 31}, "at least 32"),
        ({"device": "cuda:1"}, "--device cuda:1: .* CUDA_VISIBLE_DEVICES names; leave"),
        ({"world": 2}, "--engine-option tp=N"),
        ({"model": None}, "--model PATH is missing"),
    ],
)
def test_a_faulty_option_is_one_clear_line(given: dict[str, Any], message: str) -> None:
    model = given.pop("model", tiny_llama_folder())
    options = EngineOptions(model, "tiny", **{"kv_tokens": 1024, **given})
    with pytest.raises(ModelError, match=message) as told:
        load_engine("trtllm", options, lambda _fraction: None)
    assert "\n" not in str(told.value)


def test_a_request_that_fails_fails_alone(engine: Engine, prompts: list[list[int]]) -> None:
    generate(engine, 2, prompts[1], 1)
    fake().toy.fault = lambda request: "a bad request" if request.tokens[0] == 99 else ""
    outcome = engine.step(Plan(admits=[admit(1, [99, 1])], work=[(1, 2), (2, 1)]))
    assert outcome.failures == {1: "trtllm failed the request: a bad request"}
    assert outcome.sequences == [2]
    assert len(decode(engine, 2, 3)) == 3
    # What has failed is gone there, too.
    assert fake().toy.aborted == []


@pytest.mark.parametrize("kind", [ValueError, fake_trtllm.RequestError])
def test_a_request_that_it_does_not_take_fails_alone(
    engine: Engine, prompts: list[list[int]], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = fake_trtllm.ToyEngine.submit

    def submit(toy: fake_trtllm.ToyEngine, request: fake_trtllm.Running) -> None:
        if request.tokens[0] == 99:
            raise kind("too long")
        take(toy, request)

    monkeypatch.setattr(fake_trtllm.ToyEngine, "submit", submit)
    generate(engine, 2, prompts[1], 1)
    outcome = engine.step(Plan(admits=[admit(1, [99, 1])], work=[(1, 2), (2, 1)]))
    assert outcome.failures == {1: "trtllm refused the request: too long"}


def test_a_drop_aborts_the_request(engine: Engine) -> None:
    fake().toy.stalled = True
    engine.step(Plan(admits=[admit(1, [1, 2, 3])], work=[(1, 1)]))
    until(lambda: bool(fake().toy.asked))
    engine.step(Plan(drops=[1]))
    until(lambda: fake().toy.aborted == ["1"])
    assert not fake().toy.waiting + fake().toy.running


def test_a_dead_engine_is_lost(engine: Engine) -> None:
    fake().toy.dies_after = 2
    with pytest.raises(EngineLost, match=r"trtllm failed: EngineDied: .*code -9"):
        generate(engine, 1, [1, 2, 3], 4)
