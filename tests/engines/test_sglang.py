"""SGLang's adapter: against the recorded signature, and against a fake of exactly that signature.

What the fake is: ``signatures/fake_sglang.py``. What cannot be checked without a device is said in
``docs/engines/sglang.md``.
"""

import math
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
from tests.engines.signatures import fake_sglang
from tests.engines.signatures.strict import fields, installed, recorded
from tests.engines.signatures.toy import logits
from tests.engines.signatures.uses import call_keywords, keys_of, names_read
from tests.heavy.models import tiny_llama_folder

ADAPTER = "sglang_engine"


def make(**given: Any) -> Engine:
    extra = {key: str(given.pop(key)) for key in list(given) if key in EXTRAS}
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        **{"kv_tokens": 1024, "sequences_max": 8, "step_tokens_max": 256, **given},
        extra=tuple(extra.items()),
    )
    return load_engine("sglang", options, lambda _fraction: None)


EXTRAS = ("tp", "deterministic", "lease_tokens", "answer_s", "memory_share", "prefix_cache")


@pytest.fixture(autouse=True)
def package() -> Iterator[Any]:
    fake_sglang.Engine.made.clear()
    module = fake_sglang.module()
    with installed(sglang=module):
        yield module


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make(deterministic=1)
    yield made
    made.close()


@pytest.fixture
def prompts() -> list[list[int]]:
    return [list(range(10 * n, 10 * n + 22 + n)) for n in range(1, 5)]


def fake() -> fake_sglang.Engine:
    return fake_sglang.Engine.made[-1]


class TestContract(EngineContract):
    """The suite without what SGLang has no word for, and the router is told so.

    Prefixes are shared by its own cache, without a word of the router, and what a step computes is
    its own affair; a new lease would forget which tokens a penalty has seen.
    """

    test_shared_prefix_is_as_computed = None
    test_generated_tokens_can_be_shared = None
    test_steps_that_overlap_are_as_one_after_the_other = None
    test_kv_budget_counts_shared_tokens_once = None
    test_goes_on_beside_others_and_from_a_shared_prefix = None
    test_penalties_go_on_anywhere = None
    test_penalties_see_generated_tokens_only = None
    test_logprobs_are_raw_and_natural = None  # uses a penalty; see below


# The recorded signature ---------------------------------------------------------------------------


def test_every_argument_and_field_is_in_the_recorded_signature() -> None:
    assert keys_of(ADAPTER, "_arguments") <= set(fake_sglang.ARGUMENTS)
    assert keys_of(ADAPTER, "_sampling") <= set(fields("sglang", "SamplingParams"))
    called = call_keywords(ADAPTER, "async_generate")
    assert called <= set(recorded("sglang", "functions", "Engine.async_generate")["positional"])
    assert {"get_server_info", "async_generate", "shutdown"} <= names_read(ADAPTER, "_engine")
    for name in names_read(ADAPTER, "_engine"):
        assert recorded("sglang", "functions", f"Engine.{name}")
    assert names_read(ADAPTER, "sglang") == {"Engine"}
    assert recorded("sglang", "names", "Engine")
    assert recorded("sglang", "names", "SGLANG_RETURN_ORIGINAL_LOGPROB")


def test_a_keyword_that_sglang_does_not_have_is_noticed() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        fake_sglang.Engine(max_running_requests=1, no_such_argument=1)


# What it says of itself, and asks of SGLang -------------------------------------------------------


def test_describes_what_is_true(engine: Engine) -> None:
    info = engine.describe()
    assert info.scheduling is Scheduling.SELF
    assert (info.page_tokens, info.sequences_max, info.vocab_size) == (8, 8, 288)
    assert set(info.features) == {"logprobs", "logit_bias", "min_tokens", "seed"}
    # The pool also holds a lease and a page begun for each sequence.
    assert info.kv_tokens == 1024 - 8 * 8
    assert info.length_max == min(info.kv_tokens, 1024 - 7)
    given = fake().arguments
    assert given["max_total_tokens"] == 1024 + 8 * 128
    assert given["skip_tokenizer_init"] is True
    assert "trust_remote_code" not in given


def test_no_seed_without_deterministic_kernels() -> None:
    engine = make()
    assert "seed" not in engine.describe().features
    generate(engine, 1, [1, 2, 3], 1, SamplingParams(temperature=1.0, seed=7))
    engine.close()


def test_the_table_of_engines_says_the_same(tmp_path: Path) -> None:
    facts = ENGINES["sglang"]
    least, most = make(), make(deterministic=1, adapters=(("poet", tmp_path),))
    assert set(least.describe().features) == set(facts.features)
    assert set(most.describe().features) == {*facts.features, *facts.optional}
    least.close()
    most.close()


def test_ranks_adapters_and_devices_are_passed_on(tmp_path: Path) -> None:
    engine = make(
        tp=2, adapters=(("poet", tmp_path),), device="cuda", dtype="bfloat16", memory_share=0.5
    )
    given = fake().arguments
    assert (given["tp_size"], given["device"], given["dtype"]) == (2, "cuda", "bfloat16")
    assert given["lora_paths"] == {"poet": str(tmp_path)}
    assert given["mem_fraction_static"] == 0.5
    assert engine.describe().adapters == ("poet",)
    assert "lora" in engine.describe().features
    made = Admit(1, [1, 2, 3], 3, SamplingParams(), adapter="poet")
    assert engine.step(Plan(admits=[made], work=[(1, 3)])).sequences == [1]
    with pytest.raises(PlanError, match="the adapter nobody"):
        engine.step(Plan(admits=[Admit(2, [1], 1, SamplingParams(), adapter="nobody")]))
    engine.close()


def test_logprobs_are_raw_and_natural(engine: Engine) -> None:
    prompt = [5, 6, 7, 8]
    raw = logits(prompt).astype(float)
    raw -= math.log(sum(math.exp(value) for value in raw))
    sampling = SamplingParams(temperature=2.0, top_k=5, seed=1, logprobs=True, top_logprobs=3)
    outcome = engine.step(Plan(admits=[admit(1, prompt, sampling)], work=[(1, 4)]))
    found = outcome.logprobs[1]
    assert found.logprob == pytest.approx(raw[outcome.tokens[0]], abs=1e-4)
    assert list(found.top_values) == pytest.approx(sorted(raw, reverse=True)[:3], abs=1e-4)
    assert list(found.top_tokens) == [int(t) for t in (-raw).argsort()[:3]]


def test_what_would_not_be_raw_is_refused_for_that_sequence_alone(
    engine: Engine, prompts: list[list[int]]
) -> None:
    skewed = SamplingParams(logprobs=True, logit_bias=((3, 1.0),))
    plan = Plan(
        admits=[admit(1, prompts[0], skewed), admit(2, prompts[1])],
        work=[(1, len(prompts[0])), (2, len(prompts[1]))],
    )
    outcome = engine.step(plan)
    assert outcome.sequences == [2]
    assert "no raw log probabilities" in outcome.failures[1]
    assert engine.step(Plan(work=[(1, 1), (2, 1)])).sequences == [2]


def test_a_feature_that_was_not_offered_is_refused(engine: Engine) -> None:
    for sampling, word in (
        (SamplingParams(presence_penalty=1.0), "penalties"),
        (SamplingParams(repetition_penalty=1.1), "penalties"),
        (SamplingParams(temperature=1.0, typical_p=0.5), "typical_p"),
    ):
        with pytest.raises(PlanError, match=f"sglang does not support {word}"):
            engine.step(Plan(admits=[admit(1, [1, 2], sampling)]))
    shared = Admit(2, list(range(16)), 16, SamplingParams(), share_from=1, share_len=8)
    with pytest.raises(PlanError, match="shares no prefixes"):
        engine.step(Plan(admits=[admit(1, list(range(20))), shared]))


def test_a_large_seed_keeps_its_bits(engine: Engine) -> None:
    low, high = (
        generate(engine, n, [1, 2, 3], 6, SamplingParams(temperature=3.0, seed=seed))
        for n, seed in enumerate((1, (1 << 64) - 1), start=1)
    )
    assert low != high


# When SGLang is not there -------------------------------------------------------------------------


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    with pytest.raises(
        ModelError, match=r"needs the package sglang: roundhouse engines install"
    ) as told:
        make()
    assert "\n" not in str(told.value)


def test_a_missing_device_is_one_clear_line(package: Any) -> None:
    package.Engine.broken = "No accelerator (CUDA, XPU) is available.\nTraceback ..."
    with pytest.raises(ModelError, match=r"^sglang: did not start: No accelerator .*available\.$"):
        make()


def test_a_start_that_fails_late_gives_the_memory_back() -> None:
    with pytest.raises(ModelError, match="too few beside"):
        make(kv_tokens=0, sequences_max=64)
    assert fake().shut_down == 1


def test_why_a_start_failed_is_told_though_the_end_fails_too(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_engine: Any) -> None:
        raise OSError("no such process")

    monkeypatch.setattr(package.Engine, "shutdown", fail)
    with pytest.raises(ModelError, match="too few beside"):
        make(kv_tokens=0, sequences_max=64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world": 2}, "--engine-option tp=N"),
        ({"kv_tokens": 0, "sequences_max": 64}, "too few beside"),
        ({"lease_tokens": "x"}, "lease_tokens=x"),
    ],
)
def test_a_faulty_option_is_one_clear_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as told:
        make(**given)
    assert "\n" not in str(told.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    options = EngineOptions(tmp_path, "nothing")
    with pytest.raises(ModelError, match="not a model folder"):
        load_engine("sglang", options, lambda _fraction: None)


def test_a_request_that_sglang_refuses_fails_alone(
    engine: Engine, prompts: list[list[int]]
) -> None:
    engine.step(Plan(admits=[admit(2, prompts[1])], work=[(2, len(prompts[1]))]))
    fake().toy.fault = lambda request: "the input is too long" if request.tokens[0] == 99 else ""
    outcome = engine.step(Plan(admits=[admit(1, [99, 1])], work=[(1, 2), (2, 1)]))
    assert outcome.failures == {1: "sglang refused the request: the input is too long"}
    assert outcome.sequences == [2]
    assert len(decode(engine, 2, 3)) == 3


def test_a_dead_engine_is_lost(engine: Engine) -> None:
    fake().toy.dies_after = 2
    with pytest.raises(EngineLost, match=r"sglang failed: EngineDied: .*code -9"):
        generate(engine, 1, [1, 2, 3], 4)
    with pytest.raises(EngineLost):
        engine.step(Plan())


def test_closing_shuts_it_down(prompts: list[list[int]]) -> None:
    engine = make()
    generate(engine, 1, prompts[0], 1)
    engine.close()
    assert fake().shut_down == 1
