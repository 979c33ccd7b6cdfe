"""How vLLM is made: its environment, its arguments, and one line for each thing that can go wrong.

Nothing here imports vLLM before ``environment`` has been called: it reads most of its environment
variables once.
"""

import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from platform import machine
from typing import TYPE_CHECKING, Any

from shards.engines import other_ranks
from shards.engines.base import EngineOptions, ModelError, Progress
from shards.engines.peers import Peers
from shards.engines.threads import usable_cores
from shards.engines.vllm_compile import whole_files_only
from shards.extras import Extras
from shards.hf_folder import is_hf_folder, read_config, read_json

if TYPE_CHECKING:
    from vllm import EngineArgs, LLMEngine
    from vllm.config import VllmConfig

VERSION = "0.32.0"
CPU_WORKER = "shards.engines.vllm_cpu_worker.RankCPUWorker"
# vLLM's own default on CPUs is 128; prefixes are shared in whole blocks, and 32 is the least.
CPU_PAGE_TOKENS = 32
CPU_KV_TOKENS_MAX = 32768
CPU_KV_MEMORY_SHARE, CPU_WEIGHTS_SHARE = 0.25, 0.5
CPU_SEQUENCES_MAX, SEQUENCES_MAX = 64, 256
CPU_STEP_TOKENS_MAX, STEP_TOKENS_MAX = 512, 2048
# How long compute threads spin for the next operation before they sleep. The default of GNU's
# OpenMP, milliseconds, takes cores from the router, and everybody waits if a program has one.
SPIN_COUNT = 2000
# The ranks that vLLM has kernels for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MESSAGE_MAX = 300
SAMPLERS = ("auto", "vllm", "host")
# Shares of the way to a loaded engine.
_IMPORTED, _CONFIGURED, _WEIGHED, _READY = 0.05, 0.1, 0.7, 1.0

_ALWAYS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner knows no logits processors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a folder
}
_UNLESS_SET = {
    # Standard error belongs to the worker's own messages.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "GLOO_LOG_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The engine options of this engine; see ``vllm_engine``."""

    eager: bool
    page_tokens: int
    length_max: int
    memory_fraction: float
    quantization: str
    kv_dtype: str
    sampler: str


def chosen(options: EngineOptions) -> Chosen:
    """Reads the engine options. Raises ``ModelError``."""
    extras = Extras("vllm", options.extra)
    found = Chosen(
        eager=extras.whole("eager", 0) > 0,
        page_tokens=extras.whole("page_tokens", 0),
        length_max=extras.whole("length_max", 0),
        memory_fraction=extras.number("memory_fraction", 0.9),
        quantization=extras.text("quantization", ""),
        kv_dtype=extras.text("kv_dtype", "auto"),
        sampler=extras.choice("sampler", "auto", SAMPLERS),
    )
    extras.finish()
    if not 0.0 < found.memory_fraction <= 1.0:
        raise ModelError("vllm: engine option memory_fraction is above 0 and at most 1")
    return found


def draws_itself(options: EngineOptions, device: str) -> bool:
    """Whether vLLM's own sampler draws what it can; see the engine option ``sampler``.

    On a CPU the logits are where the host's sampler is, which does not sort them: it takes half the
    time, and with top_p a twentieth (``benchmarks/vllm_sampler.py``).
    """
    asked = chosen(options).sampler
    return asked == "vllm" or (asked == "auto" and device != "cpu")


def environment(options: EngineOptions) -> None:
    """Sets what vLLM, PyTorch and OpenMP read from the environment, before they are imported."""
    os.environ.update(_ALWAYS)
    for key, value in _UNLESS_SET.items():
        os.environ.setdefault(key, value)
    if os.environ["VLLM_LOGGING_LEVEL"] == _UNLESS_SET["VLLM_LOGGING_LEVEL"]:
        # It warns of what is so on every CPU, before vLLM's own level holds.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(options) or usable_cores()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    kind, _, index = options.device.partition(":")
    if kind == "cuda" and index and options.world == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = [device for device in visible.split(",") if device]
        if devices and int(index) >= len(devices):
            raise ModelError(f"vllm: --device {options.device}, but CUDA_VISIBLE_DEVICES={visible}")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(index)] if devices else index


def threads(options: EngineOptions) -> int:
    """Compute threads of this rank; 0: as many as the machine's other work leaves cores for.

    Ranks that share a host share its cores, and must not wait for one that has fewer.
    """
    if options.threads or options.world == 1:
        return options.threads
    return max(1, usable_cores() // options.world)


def set_threads(count: int) -> None:
    """Computes the next operations of this thread with so many, on CPUs.

    vLLM puts a function that does nothing in the place of ``torch.set_num_threads``.
    """
    import torch

    if torch.get_num_threads() != count:
        torch._C.set_num_threads(count)  # noqa: SLF001


def meet(options: EngineOptions) -> Peers:
    """Finds the other ranks, and says in the environment where vLLM's own store is to be."""
    peers = Peers(options.rank, options.world, options.rendezvous)
    local = options.device.partition(":")[2] or str(options.rank)
    os.environ.update(
        RANK=str(options.rank),
        LOCAL_RANK=local,
        WORLD_SIZE=str(options.world),
        MASTER_ADDR=options.rendezvous.rpartition(":")[0].strip("[]"),
        MASTER_PORT=str(peers.store_port),
    )
    return peers


def check(options: EngineOptions) -> Path:
    """The model folder, if it can be one. Raises ``ModelError``."""
    if options.model is None:
        raise ModelError("vllm: --model FOLDER is missing")
    if not options.model.exists():
        raise ModelError(f"model folder {options.model}: does not exist")
    if not is_hf_folder(options.model):
        raise ModelError(
            f"model folder {options.model}: has no config.json; vllm takes a folder in the format"
            " of the Hugging Face libraries"
        )
    if options.world > 1 and not options.rendezvous:
        raise ModelError("vllm: several ranks need --rendezvous HOST:PORT")
    if not re.fullmatch(r"(\w+(:\d+)?)?", options.device):
        raise ModelError(
            f"vllm: --device {options.device} is no device; it is a word, perhaps with a number,"
            " such as cuda:1"
        )
    _check_split(options.model, options.world)
    return options.model


def _check_split(folder: Path, world: int) -> None:
    """As vLLM itself does, but before ranks meet, and in our words."""
    config = read_config(folder)
    inner = config.get("text_config")
    heads = (inner if isinstance(inner, dict) else config).get("num_attention_heads")
    if isinstance(heads, int) and heads % world:
        raise ModelError(
            f"model folder {folder}: {heads} attention heads cannot be split evenly over {world}"
            f" ranks; {other_ranks(heads)}"
        )


def make(folder: Path, options: EngineOptions, progress: Progress) -> "LLMEngine":
    """Loads the model. Raises ``ModelError`` with one line."""
    # They warn about their own use of each other, on the worker's standard error.
    warnings.filterwarnings("ignore", module=r"(vllm|torch|transformers)(\.|$)")
    from vllm import LLMEngine, __version__

    if not __version__.startswith(VERSION):
        raise ModelError(f"vllm: version {__version__} is installed; this engine needs {VERSION}")
    from vllm.platforms import current_platform

    from shards.engines.vllm_loader import report_to

    wanted, here = options.device.partition(":")[0], current_platform.device_type
    if wanted not in ("", here):
        raise ModelError(f"vllm: --device {options.device}, but this vLLM computes on {here}")
    if not chosen(options).eager:
        whole_files_only()
    set_threads(threads(options) or usable_cores())
    progress(_IMPORTED)
    try:
        config = _arguments(folder, options, current_platform.device_type).create_engine_config()
        _size_cache(config, options, current_platform.device_type)
        progress(_CONFIGURED)
        span = _WEIGHED - _CONFIGURED
        report_to(lambda fraction: progress(_CONFIGURED + span * fraction))
        engine: LLMEngine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model folder {folder}: {one_line(error)}") from error
    finally:
        report_to(None)
    progress(_READY)
    return engine


def one_line(error: Exception) -> str:
    """What an exception of vLLM's says, in one line that is not too long."""
    text = str(error) or type(error).__name__
    # pydantic puts a heading before, and its address behind, what was said.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("Value error, ")]
    words = " ".join(said[0].removeprefix("Value error, ").split() if said else lines)
    words = words.partition(" [type=")[0]
    return words if len(words) <= MESSAGE_MAX else words[: MESSAGE_MAX - 1] + "…"


def _arguments(folder: Path, options: EngineOptions, device: str) -> "EngineArgs":
    from vllm import EngineArgs

    from shards.engines.vllm_loader import LOAD_FORMAT
    from shards.engines.vllm_sampling import PROCESSOR

    asked = chosen(options)
    on_cpu = device == "cpu"
    sequences = options.sequences_max or (CPU_SEQUENCES_MAX if on_cpu else SEQUENCES_MAX)
    tokens = options.step_tokens_max or (CPU_STEP_TOKENS_MAX if on_cpu else STEP_TOKENS_MAX)
    more: dict[str, Any] = {}
    if page_tokens := asked.page_tokens or (CPU_PAGE_TOKENS if on_cpu else 0):
        more["block_size"] = page_tokens
    if on_cpu:
        more["worker_cls"] = CPU_WORKER
    if asked.quantization:
        more["quantization"] = asked.quantization
    if options.adapters:
        more |= _lora(options, on_cpu=on_cpu)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=options.dtype or ("float32" if slow_dtype(folder, device) else "auto"),
        kv_cache_dtype=asked.kv_dtype,
        max_model_len=asked.length_max + 1 if asked.length_max else -1,
        max_num_seqs=sequences,
        max_num_batched_tokens=max(tokens, sequences),
        gpu_memory_utilization=asked.memory_fraction,
        enforce_eager=asked.eager,
        # Pages are ours: one kind of them, all kept, shared when the plan says so.
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        disable_hybrid_kv_cache_manager=True,
        async_scheduling=False,
        seed=0,
        tensor_parallel_size=options.world,
        distributed_executor_backend="external_launcher" if options.world > 1 else "uni",
        load_format=LOAD_FORMAT,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        logits_processors=[PROCESSOR],
        **more,
    )


def slow_dtype(folder: Path, device: str) -> str:
    """The model's own element type, if this processor has no instructions for it; else "".

    Then float32 is several times faster, if there is room for it.
    """
    import torch

    if device != "cpu" or machine() not in ("x86_64", "AMD64"):
        return ""
    config = read_config(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    if dtype not in ("bfloat16", "float16") or torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 - as vLLM asks
        return ""
    return dtype if 2 * weight_bytes(folder) < _memory_bytes() * CPU_WEIGHTS_SHARE else ""


def weight_bytes(folder: Path) -> int:
    """Size of the folder's weight files."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def _lora(options: EngineOptions, *, on_cpu: bool) -> dict[str, Any]:
    """Room for every adapter at once, so that none is loaded while a batch waits."""
    ranks = [_lora_rank(name, folder) for name, folder in options.adapters]
    fitting = [rank for rank in LORA_RANKS if rank >= max(ranks)]
    if not fitting:
        raise ModelError(f"vllm: an adapter has rank {max(ranks)}; {LORA_RANKS[-1]} is the most")
    # In a batch with adapters, vLLM's operators for CPUs (lora/ops/torch_ops) give a token that has
    # none the last place, as index -1. So that one stays empty: its weights are zero.
    count = len(options.adapters) + on_cpu
    return {
        "enable_lora": True,
        "max_loras": count,
        "max_cpu_loras": count,
        "max_lora_rank": fitting[0],
    }


def _lora_rank(name: str, folder: Path) -> int:
    try:
        rank = read_json(folder / "adapter_config.json").get("r")
    except ModelError as error:
        raise ModelError(f"adapter {name}: {error}") from error
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"adapter {name}: {folder / 'adapter_config.json'} names no rank r")
    return rank


def _size_cache(config: "VllmConfig", options: EngineOptions, device: str) -> None:
    """Sets the number of pages: as many as asked for, and one that vLLM keeps to itself.

    On a CPU a size is always set: left alone, vLLM takes most of the machine's memory.
    """
    cache, model = config.cache_config, config.model_config
    heads, layers = (
        model.get_num_kv_heads(config.parallel_config),
        model.get_num_layers(config.parallel_config),
    )
    # Of the kinds of attention that there are, plain attention takes the most.
    per_token = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
    kv_tokens = options.kv_tokens
    if not kv_tokens and device == "cpu":
        room = int(_memory_bytes() * CPU_KV_MEMORY_SHARE) // max(1, per_token * options.world)
        kv_tokens = min(room, CPU_KV_TOKENS_MAX)
    if not kv_tokens:
        return
    pages = max(1, -(-kv_tokens // cache.block_size)) + 1
    cache.num_gpu_blocks_override = pages
    if device == "cpu":
        cache.kv_cache_memory_bytes = pages * cache.block_size * per_token


def _memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
