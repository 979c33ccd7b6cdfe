"""Router and workers on this machine, as one command: what ``roundhouse serve`` runs."""

import asyncio
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.console import Console, Urls
from deploy.models import Model
from deploy.supervisor import Supervisor, WorkerSpec
from router import app
from router.config import GroupSpec, Settings

OnReady = Callable[[int, int], None]
"""Called with the ports of REST and gRPC."""

# A unix socket's path may have 104 bytes on macOS and 108 on Linux.
SOCKET_PATH_MAX = 100


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What every worker of a group is started with. A count of 0: the engine chooses."""

    engine: str
    world: int = 1
    threads: int = 0
    kv_tokens: int = 0
    sequences_max: int = 0
    step_tokens_max: int = 0
    engine_options: tuple[str, ...] = ()
    interpreter: str = sys.executable


def worker_command(options: WorkerOptions, model: Model, listen: str, rank: int) -> list[str]:
    """The command line of one worker."""
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
    for pair in options.engine_options:
        command += ["--engine-option", pair]
    return command


def socket_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="roundhouse-"))
    if len(str(folder / "worker-99.sock").encode()) > SOCKET_PATH_MAX:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="roundhouse-", dir="/tmp"))
    return folder


def worker_specs(options: WorkerOptions, model: Model, folder: Path) -> list[WorkerSpec]:
    """One worker for each rank, on sockets in ``folder``."""
    specs = []
    for rank in range(options.world):
        socket = folder / f"worker-{rank}.sock"
        command = worker_command(options, model, f"unix://{socket}", rank)
        specs.append(WorkerSpec(f"worker {rank}", (*command, "--exit-with-parent"), socket))
    return specs


def check_ports(settings: Settings) -> None:
    """Raises ``OSError`` if a port cannot be had; loading a model takes longer than this."""
    for port, option in ((settings.port, "--port"), (settings.grpc_port, "--grpc-port")):
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot listen on {settings.host}:{port}: {reason}; "
                f"choose another port with {option}, or another address with --hostname"
            ) from error


async def serve(settings: Settings, model: Model, options: WorkerOptions, console: Console) -> None:
    """Serves one model until SIGTERM or SIGINT has been obeyed.

    The router begins when the workers have loaded: until then its ports are closed. Raises
    ``StartError`` if a worker cannot start, ``OSError`` if a port cannot be had, ``CancelledError``
    on a signal while loading.
    """
    check_ports(settings)
    folder = socket_folder()
    try:
        workers = worker_specs(options, model, folder)
        addresses = tuple(f"unix://{worker.socket}" for worker in workers)
        group = GroupSpec("local", model.model_id, addresses)
        supervisor = Supervisor(workers, console.tell)
        on_ready = _announcer(settings, model.model_id, console)
        await _together(settings, group, supervisor, on_ready)
    finally:
        console.close()
        shutil.rmtree(folder, ignore_errors=True)


async def route(settings: Settings, groups: tuple[GroupSpec, ...], console: Console) -> None:
    """Serves the models of workers elsewhere until SIGTERM or SIGINT has been obeyed."""
    check_ports(settings)
    await app.serve(settings, groups, _announcer(settings, "", console))


def _announcer(settings: Settings, model_id: str, console: Console) -> OnReady:
    """What to do once the router serves on these two ports."""
    return lambda port, grpc_port: console.ready(
        Urls.of(settings.host, port, grpc_port), model_id, settings.api_key
    )


async def _together(
    settings: Settings, group: GroupSpec, supervisor: Supervisor, on_ready: OnReady
) -> None:
    """Runs the router beside the supervisor; either one's failure ends both."""
    this = asyncio.current_task()
    assert this is not None, "a coroutine runs in a task"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(supervisor.run())
            # The router's own handlers take over when it begins.
            loop.add_signal_handler(signal.SIGTERM, this.cancel)
            await supervisor.all_ready()
            await app.serve(settings, (group,), on_ready)
            keeper.cancel()
    except ExceptionGroup as failures:
        # One failure cancels the other task, so there is one to tell of.
        raise failures.exceptions[0] from None
