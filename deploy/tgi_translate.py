"""From the flags of TGI's launcher to the command line of ``roundhouse serve``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from deploy.engines import GGUF, choose, format_of
from deploy.models import ModelNotFound
from deploy.options import UserError
from deploy.tgi_flags import BY_KEY, FLAGS, IGNORED_VARIABLES, Fate

# What vLLM calls what TGI can do to weights; it finds out by itself how a checkpoint is stored.
VLLM_QUANTIZATIONS = {
    "awq": "awq",
    "gptq": "gptq",
    "marlin": "gptq_marlin",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "bitsandbytes-nf4": "bitsandbytes",
}
VLLM_CACHE_TYPES = {"fp8_e4m3fn": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
# What TGI's router calls itself in traces.
SERVICE_NAME = "text-generation-inference.router"
# The levels of tracing's filters, by ours.
LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "error": "error",
    "off": "error",
}


@dataclass(frozen=True, slots=True)
class Translation:
    """What ``roundhouse serve`` is started with, and the flags and variables that are dropped.

    ``variables`` are to be set before anything of the hub is imported.
    """

    arguments: tuple[str, ...]
    ignored: tuple[str, ...]
    variables: Mapping[str, str]


def translate(given: Mapping[str, Any], env: Mapping[str, str], folder: Path) -> Translation:
    """Translates the flags that were given, by name; a file that is needed is put into ``folder``.

    Raises ``UserError`` with all that is refused, in one line.
    """
    _refuse(given)
    arguments = [given["model_id"]] if given.get("model_id") else []
    for flag in FLAGS:
        if flag.fate is Fate.PASSED and flag.key in given:
            arguments += _typed(flag.name, given[flag.key])
    world = _world(given, env)
    arguments += ["--num-shard", str(world)]
    if length := _input_tokens(given):
        arguments += ["--max-input-tokens", str(length)]
    arguments += _listening(given, env)
    for_engine, dropped = _engine_options(given, env, world)
    arguments += for_engine
    if path := given.get("tokenizer_config_path"):
        arguments += ["--chat-template", str(_template(Path(path), folder))]
    if given.get("otlp_endpoint"):
        arguments += ["--otlp-service-name", given.get("otlp_service_name") or SERVICE_NAME]
    if text := env.get("LOG_LEVEL"):
        arguments += ["--log-level", log_level(text)]
    cache = given.get("huggingface_hub_cache")
    return Translation(
        tuple(arguments),
        (*_ignored(given, env), *dropped),
        {"HF_HUB_CACHE": cache} if cache else {},
    )


def _typed(name: str, value: Any) -> list[str]:
    """A flag as it would be typed."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    values = value if isinstance(value, tuple) else (value,)
    return [text for one in values for text in (f"--{name}", str(one))]


def _refuse(given: Mapping[str, Any]) -> None:
    """Raises for flags that would change what is answered or reached, unless they are off."""
    faults: dict[str, list[str]] = {}
    for key, value in given.items():
        flag = BY_KEY[key]
        if flag.fate is Fate.REFUSED and value is not False:
            faults.setdefault(flag.reason, []).append(f"--{flag.name}")
    if faults:
        raise UserError("; ".join(f"{', '.join(names)}: {why}" for why, names in faults.items()))


def _ignored(given: Mapping[str, Any], env: Mapping[str, str]) -> tuple[str, ...]:
    names = [
        f"--{flag.name}"
        for flag in FLAGS
        if flag.fate is Fate.IGNORED and given.get(flag.key) not in (None, False)
    ]
    return (*names, *(name for name in IGNORED_VARIABLES if env.get(name)))


def _input_tokens(given: Mapping[str, Any]) -> str | None:
    """The longest prompt by its former name; the present one is passed as it is."""
    former: str | None = given.get("max_input_length")
    if former and given.get("max_input_tokens"):
        raise UserError("--max-input-length is the former name of --max-input-tokens: give one")
    return former


def _world(given: Mapping[str, Any], env: Mapping[str, str]) -> int:
    """The number of ranks, by TGI's rules (launcher/src/main.rs, ``find_num_shards``).

    Where nobody asked for ranks, a GGUF file has one: llama.cpp holds a model as a whole.
    """
    sharded, count = given.get("sharded"), given.get("num_shard")
    devices = visible_devices(env)
    if sharded and count == 1:
        raise UserError("--sharded true contradicts --num-shard 1")
    if count is not None:
        return int(count)
    if sharded:
        if devices < 2:
            raise UserError(
                "--sharded true needs two devices or more: name them in CUDA_VISIBLE_DEVICES, or "
                "give --num-shard"
            )
        return devices
    return devices if sharded is None and devices > 1 and not _is_gguf(given, env) else 1


def visible_devices(env: Mapping[str, str]) -> int:
    """The devices that the environment names; 1 if it names none, or just "all"."""
    text = next((env[name] for name in DEVICE_VARIABLES if env.get(name)), "")
    if text.strip() not in ("all", "void"):
        return max(1, len([device for device in text.split(",") if device.strip()]))
    from deploy.hardware import detect

    return max(1, sum(kind == "cuda" for kind, _ in detect().accelerators))


def _is_gguf(given: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    try:
        return format_of(given.get("model_id"), env.get("MODEL_FILE")) == GGUF
    except ModelNotFound:
        return False  # said better by whoever looks for the model


def _listening(given: Mapping[str, Any], env: Mapping[str, str]) -> list[str]:
    """Where to listen. TGI has no gRPC, so its port is any free one unless it is asked for."""
    arguments = [] if env.get("GRPC_PORT") else ["--grpc-port", "0"]
    name = given.get("hostname")
    if name is None:
        return arguments
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        if name == env.get("HOSTNAME"):
            return arguments  # the name of a container, which TGI passes over, too
    return [*arguments, "--hostname", name.strip("[]")]


def _engine_options(
    given: Mapping[str, Any], env: Mapping[str, str], world: int
) -> tuple[list[str], list[str]]:
    """What depends on the engine: types, quantisation, memory; and what this one does without.

    What is dropped may say why.
    """
    wanted = [key for key in _ENGINE_FLAGS if given.get(key) is not None]
    if not wanted:
        return [], []
    engine = env.get("ENGINE") or "auto"
    if engine == "auto":
        engine, _ = choose(given.get("model_id"), file=env.get("MODEL_FILE"), world=world)
    found = {key: _ENGINE_FLAGS[key](str(given[key]), engine) for key in wanted}
    arguments = [text for texts in found.values() for text in texts]
    dropped = [f"--{BY_KEY[key].name}" for key, texts in found.items() if not texts]
    if engine == "llamacpp" and "dtype" in found:
        dropped.append("--dtype (a GGUF file says itself: MODEL_FILE picks one)")
    return ["--engine", engine, *arguments], dropped


def _dtype(value: str, engine: str) -> list[str]:
    """For llama.cpp it takes the place of $DTYPE, which is an option of ``serve``, too."""
    return ["--dtype", "" if engine == "llamacpp" else value]


def _quantize(value: str, engine: str) -> list[str]:
    name = VLLM_QUANTIZATIONS.get(value)
    if name is None:
        raise UserError(
            f"--quantize {value}: no engine here does that: take a GGUF file, a checkpoint that is "
            f"quantised already, or one of {', '.join(VLLM_QUANTIZATIONS)} with vLLM"
        )
    if engine != "vllm":
        raise UserError(
            f"--quantize {value}: the engine {engine} cannot: set ENGINE=vllm, or take a GGUF file"
        )
    return ["--engine-option", f"quantization={name}"]


def _cache_type(value: str, engine: str) -> list[str]:
    """Numbers of 8 bits: llama.cpp's are whole ones with a scale for each 32."""
    if engine == "llamacpp":
        return ["--engine-option", "cache=q8_0"]
    if engine != "vllm":
        raise UserError(
            f"--kv-cache-dtype {value}: the engine {engine} cannot: set ENGINE=vllm, or leave it "
            "out"
        )
    return ["--engine-option", f"kv_dtype={VLLM_CACHE_TYPES[value]}"]


def _memory(value: str, engine: str) -> list[str]:
    """A share of the memory, which no other engine than vLLM takes in advance."""
    return ["--engine-option", f"memory_fraction={value}"] if engine == "vllm" else []


_ENGINE_FLAGS = {
    "dtype": _dtype,
    "quantize": _quantize,
    "kv_cache_dtype": _cache_type,
    "cuda_memory_fraction": _memory,
}


def _template(path: Path, folder: Path) -> Path:
    """A Jinja file with the template of a tokenizer_config.json, or of a file that is one."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tokenizer-config-path {path}: cannot be read: {error}") from error
    if path.suffix in (".jinja", ".j2"):
        return path
    found = _default_template(text)
    if found is None:
        raise UserError(
            f"--tokenizer-config-path {path}: holds no chat_template; leave it out to use the "
            "model's own"
        )
    made = folder / "chat_template.jinja"
    made.write_text(found)
    return made


def _default_template(config: str) -> str | None:
    """The template in a tokenizer_config.json; of several by name TGI takes the default one."""
    try:
        found = json.loads(config)["chat_template"]
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}["default"]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def log_level(text: str) -> str:
    """The level in a filter of Rust's tracing, such as ``info,text_generation_router=debug``."""
    plain = [part.strip().lower() for part in text.split(",") if "=" not in part]
    return next((LEVELS[part] for part in plain if part in LEVELS), "info")
