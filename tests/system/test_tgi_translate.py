"""From the flags of TGI's launcher to the command line of ``roundhouse serve``."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploy.commands import installed_version
from deploy.options import UserError
from deploy.tgi_command import command, shown_command
from deploy.tgi_flags import BY_KEY, FLAGS, Fate
from deploy.tgi_translate import Translation, log_level, translate

# Every flag of text-generation-inference 3.3.7.
TGI = """model-id revision validation-workers sharded num-shard quantize speculate dtype
kv-cache-dtype trust-remote-code max-concurrent-requests max-best-of max-stop-sequences
max-top-n-tokens max-input-tokens max-input-length max-total-tokens waiting-served-ratio
max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens max-batch-size cuda-graphs
hostname port prometheus-port shard-uds-path master-addr master-port huggingface-hub-cache
weights-cache-override disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor
json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma
watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support env
max-client-batch-size lora-adapters usage-stats payload-limit enable-prefill-logprobs
graceful-termination-timeout""".split()


def translated(env: dict[str, str] | None = None, **given: Any) -> Translation:
    return translate(given, env or {}, Path("/nowhere"))


def option(found: Translation, name: str) -> str:
    """The value that an option of the command line has."""
    return found.arguments[found.arguments.index(name) + 1]


def test_every_flag_of_tgi_is_known_and_no_other() -> None:
    assert sorted(flag.name for flag in FLAGS) == sorted(TGI)


def test_a_flag_that_is_passed_is_an_option_of_serve_with_the_same_variable() -> None:
    from deploy.serve_command import serve

    variables = {param.opts[0]: param.envvar for param in serve.params}
    passed = [flag for flag in FLAGS if flag.fate is Fate.PASSED]
    assert passed
    for flag in passed:
        assert variables[f"--{flag.name}"] == flag.env


def test_the_command_is_installed_under_tgis_name() -> None:
    root = Path(__file__).parents[2]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["text-generation-launcher"] == "deploy.tgi_launcher:main"


@pytest.mark.parametrize("asked", ["--version", "-V"])
def test_the_version_is_told_as_tgis_launcher_tells_it(asked: str) -> None:
    told = CliRunner().invoke(command, [asked])
    assert (told.exit_code, told.output) == (0, f"text-generation-launcher {installed_version()}\n")


def test_values_are_passed_on() -> None:
    found = translated(
        model_id="a/b", revision="main", max_total_tokens="512", json_output=True, api_key="k",
        cors_allow_origin=("https://a", "https://b"), disable_grammar_support=False,
    )  # fmt: skip
    assert found.arguments[0] == "a/b"
    assert option(found, "--revision") == "main"
    assert option(found, "--max-total-tokens") == "512"
    assert "--json-output" in found.arguments
    assert "--disable-grammar-support" not in found.arguments
    assert found.arguments.count("--cors-allow-origin") == 2
    assert option(found, "--num-shard") == "1"
    assert found.ignored == ()
    shown = shown_command(found.arguments)
    assert "--api-key ..." in shown
    assert " k " not in shown


def test_watermarks_look_as_the_flags_say() -> None:
    """The option of `serve` reads the same variable, so that the environment says it as well."""
    found = translated(watermark_gamma="0.25", watermark_delta="1.5")
    assert option(found, "--watermark-gamma") == "0.25"
    assert option(found, "--watermark-delta") == "1.5"
    assert found.ignored == ()


def test_the_former_name_of_the_longest_prompt() -> None:
    assert option(translated(max_input_length="7"), "--max-input-tokens") == "7"
    assert option(translated(max_input_tokens="7"), "--max-input-tokens") == "7"
    with pytest.raises(UserError, match="former name"):
        translated(max_input_length="7", max_input_tokens="7")


@pytest.mark.parametrize(
    ("given", "env", "world"),
    [
        ({}, {}, "1"),
        ({}, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "3"),
        ({}, {"NVIDIA_VISIBLE_DEVICES": "all"}, "1"),
        ({"num_shard": 2}, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "2"),
        ({"sharded": False}, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "1"),
        ({"sharded": True}, {"CUDA_VISIBLE_DEVICES": "0,1"}, "2"),
        ({"model_id": "a/b-GGUF"}, {"CUDA_VISIBLE_DEVICES": "0,1"}, "1"),
        ({"model_id": "a/b-GGUF", "num_shard": 2}, {}, "2"),
    ],
)
def test_ranks_are_counted_as_tgi_counts_them(
    given: dict[str, Any], env: dict[str, str], world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy.hardware import Hardware

    monkeypatch.setattr("deploy.hardware.detect", lambda: Hardware("cpu", 1, 1))
    assert option(translated(env, **({"model_id": "a/b"} | given)), "--num-shard") == world


def test_ranks_that_cannot_be() -> None:
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        translated(sharded=True)
    with pytest.raises(UserError, match="contradicts"):
        translated(sharded=True, num_shard=1)


def test_what_only_tunes_is_named_and_dropped() -> None:
    found = translated({"PREFILL_CHUNKING": "1"}, cuda_graphs="1,2", master_port="7", speculate="2")
    assert found.ignored == ("--speculate", "--cuda-graphs", "--master-port", "PREFILL_CHUNKING")
    assert not {"--cuda-graphs", "--master-port", "--speculate"} & set(found.arguments)


REFUSED = [flag.key for flag in FLAGS if flag.fate is Fate.REFUSED]


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_answers_is_refused(key: str) -> None:
    with pytest.raises(UserError) as caught:
        translated(**{key: "2" if BY_KEY[key].metavar else True})
    assert f"--{BY_KEY[key].name}: " in caught.value.message
    if not BY_KEY[key].metavar:
        translated(**{key: False})  # NGROK=false


def test_all_refusals_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        translated(ngrok=True, rope_factor="2", rope_scaling="linear")
    assert "--ngrok: " in caught.value.message
    assert "--rope-factor, --rope-scaling: " in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "option_"),
    [
        ("quantize", "gptq", "quantization=gptq"),
        ("quantize", "marlin", "quantization=gptq_marlin"),
        ("kv_cache_dtype", "fp8_e4m3fn", "kv_dtype=fp8_e4m3"),
        ("cuda_memory_fraction", "0.5", "memory_fraction=0.5"),
    ],
)
def test_what_vllm_can_is_asked_of_vllm_alone(key: str, value: str, option_: str) -> None:
    found = translated({"ENGINE": "vllm"}, model_id="a/b", **{key: value})
    assert option(found, "--engine") == "vllm"
    assert option(found, "--engine-option") == option_
    if key == "cuda_memory_fraction":
        assert translated({"ENGINE": "torch"}, **{key: value}).ignored == (f"--{BY_KEY[key].name}",)
        return
    with pytest.raises(UserError, match="torch cannot"):
        translated({"ENGINE": "torch"}, model_id="a/b", **{key: value})


def test_a_type_that_no_engine_has_is_refused() -> None:
    with pytest.raises(UserError, match="no engine here does that"):
        translated({"ENGINE": "vllm"}, quantize="eetq")


def test_a_gguf_file_has_its_own_types_of_which_a_line_tells() -> None:
    """TGI's users give --dtype, or $DTYPE, to every model; ``serve`` would refuse it here."""
    found = translated({"ENGINE": "llamacpp", "DTYPE": "float16"}, dtype="float16")
    assert option(found, "--dtype") == ""
    assert found.ignored == ("--dtype (a GGUF file says itself: MODEL_FILE picks one)",)
    found = translated({"ENGINE": "torch"}, dtype="float16")
    assert option(found, "--dtype") == "float16"
    assert found.ignored == ()


def test_a_cache_of_8_bits_is_llama_cpps_own() -> None:
    found = translated({"ENGINE": "llamacpp"}, kv_cache_dtype="fp8_e5m2")
    assert option(found, "--engine-option") == "cache=q8_0"


def test_where_to_listen() -> None:
    assert "--hostname" not in translated({"HOSTNAME": "pod-7"}, hostname="pod-7").arguments
    assert option(translated({"HOSTNAME": "::1"}, hostname="::1"), "--hostname") == "::1"
    assert option(translated(hostname="localhost"), "--hostname") == "localhost"
    assert option(translated(), "--grpc-port") == "0"
    assert "--grpc-port" not in translated({"GRPC_PORT": "50051"}).arguments


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", "info"),
        ("info,text_generation_router=debug", "info"),
        ("text_generation_router=debug", "info"),
        ("WARN", "warning"),
        ("trace", "debug"),
        ("off", "error"),
    ],
)
def test_a_filter_of_tracing_is_a_level(text: str, level: str) -> None:
    assert log_level(text) == level
    assert option(translated({"LOG_LEVEL": text}), "--log-level") == level


@pytest.mark.parametrize(
    "content",
    [
        "{{ x }}",
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ x }}"}],
    ],
)
def test_a_template_of_another_tokenizer_config(tmp_path: Path, content: object) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": content}))
    found = translate({"tokenizer_config_path": str(config)}, {}, tmp_path)
    assert Path(option(found, "--chat-template")).read_text() == "{{ x }}"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"chat_template": [{"name": "x"}]}'])
def test_a_tokenizer_config_without_a_template_is_told(tmp_path: Path, content: str) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(content)
    with pytest.raises(UserError, match="no chat_template"):
        translate({"tokenizer_config_path": str(config)}, {}, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        translate({"tokenizer_config_path": str(tmp_path / "none")}, {}, tmp_path)


def test_the_hubs_cache() -> None:
    found = translated(huggingface_hub_cache="/data")
    assert found.variables == {"HF_HUB_CACHE": "/data"}
