"""How one worker is started: what it is told, as a command line for an interpreter."""

import sys
from dataclasses import dataclass

from deploy.models import Model
from shards.config import GRACEFUL_TERMINATION_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What every worker of a group is started with. A count of 0, or "": the engine chooses.

    ``device`` may name one device for each rank, joined by commas. ``adapters`` are NAME=PATH,
    ``engine_options`` KEY=VALUE. ``interpreter`` is the Python that runs the workers.
    ``graceful_termination_timeout_s`` is how long one that is told to leave waits for its router.
    """

    engine: str
    world: int = 1
    threads: int = 0
    kv_tokens: int = 0
    sequences_max: int = 0
    step_tokens_max: int = 0
    device: str = ""
    dtype: str = ""
    adapters: tuple[str, ...] = ()
    engine_options: tuple[str, ...] = ()
    interpreter: str = sys.executable
    graceful_termination_timeout_s: float = GRACEFUL_TERMINATION_TIMEOUT_S


def worker_command(
    options: WorkerOptions, model: Model, listen: str, rank: int, rendezvous: str = ""
) -> list[str]:
    """The command line of one worker; ``rendezvous`` is HOST:PORT, where its group meets."""
    # -P: the folder that the user is in may hold anything, under any name.
    command = [options.interpreter, "-P", "-m", "shards"]
    if model.path is not None:
        command += ["--model", str(model.path)]
    if model.chat_template is not None:
        command += ["--chat-template", str(model.chat_template)]
    command += ["--model-id", model.model_id, "--engine", options.engine, "--listen", listen]
    command += ["--rank", str(rank), "--world", str(options.world)]
    for name in ("threads", "kv_tokens", "sequences_max", "step_tokens_max"):
        if count := getattr(options, name):
            command += [f"--{name.replace('_', '-')}", str(count)]
    texts = {"device": _device(options.device, rank), "dtype": options.dtype}
    for name, text in (texts | {"rendezvous": rendezvous}).items():
        if text:
            command += [f"--{name}", text]
    if (limit_s := options.graceful_termination_timeout_s) != GRACEFUL_TERMINATION_TIMEOUT_S:
        command += ["--graceful-termination-timeout", f"{limit_s:g}"]
    for pair in options.adapters:
        command += ["--adapter", pair]
    for pair in options.engine_options:
        command += ["--engine-option", pair]
    return command


def _device(devices: str, rank: int) -> str:
    """The device of one rank, if there is one for each; or else that of all."""
    each = devices.split(",")
    return each[rank] if rank < len(each) > 1 else devices
