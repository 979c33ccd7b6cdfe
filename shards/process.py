"""One worker as a process, until a signal, its parent's end, or the engine's loss.

What happens is told on standard error, one JSON object a line: ``listening``, ``loading`` with a
``fraction``, ``warning``, ``ready`` with ``address`` and ``seconds``, ``leaving`` with ``limit_s``
and a ``message``, ``error`` with a ``message``. Exit codes: 0 after a signal, 1 if it never became
ready, 2 for a faulty command line, 3 if the engine was lost.

    signal ──no stream──────────────────────────────► stop
           ──a stream──► told to its router ──closed, or limit_s over──► stop

A second signal ends the process where it stands. The parent's end does not wait for the router,
whether it comes before a signal or after one.
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from shards import engines
from shards.config import CLUSTER, ConfigError, WorkerConfig, parse
from shards.engines.base import Engine, ModelError
from shards.service_manager import ServiceManager
from shards.worker import Worker
from tls.before_grpc import EXPERIMENTS
from tls.files import TlsError
from tls.identity import Identity
from tls.wire import stays_here

EXIT_NOT_READY = 1
EXIT_USAGE = 2
EXIT_LOST = 3
# After the parent's end, a worker that has not left by itself within this time is ended.
ORPHAN_S = 10.0
PROGRESS_STEP = 0.02


def tell(event: str, **facts: object) -> None:
    """One line for whoever started the worker, who may be gone."""
    with suppress(OSError):
        sys.stderr.write(json.dumps({"event": event, **facts}) + "\n")
        sys.stderr.flush()


def main() -> int:
    """Runs the worker; returns the exit code."""
    try:
        config = parse(sys.argv[1:])
    except ConfigError as error:
        tell("error", message=str(error))
        return EXIT_USAGE
    return _run_loop(_run(config))


def _run_loop(main: Coroutine[None, None, int]) -> int:
    """On uvloop where there is one: each step then costs less of the cores that compute it."""
    try:
        import uvloop
    except ImportError:  # an engine's own environment may lack it
        return asyncio.run(main)
    return uvloop.run(main)


@dataclass(frozen=True, slots=True)
class _Orders:
    """What the worker has been told: to leave in good order, or (its parent is gone) at once.

    ``manager`` is who hears that it obeys the first.
    """

    manager: ServiceManager = field(default_factory=ServiceManager.taken)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    end: asyncio.Event = field(default_factory=asyncio.Event)


async def _run(config: WorkerConfig) -> int:
    began = time.monotonic()
    orders = _Orders()
    _watch_signals(orders.leave)
    if config.exit_with_parent:
        _watch_parent(orders.end, asyncio.get_running_loop())
    try:
        cluster = _cluster(config)
        overrides = partial(_overrides, config)
        worker = Worker(partial(_make, config), config.listen, overrides, cluster)
        await worker.start()
    except (TlsError, OSError) as error:
        tell("error", message=str(error))
        return EXIT_NOT_READY
    tell("listening", address=worker.address)
    if cluster is None and not stays_here(worker.address):
        _warn(
            f"whoever reaches {worker.address} can use this worker and read what it is asked: "
            f"give it and its router {', '.join(CLUSTER[:-1])} and {CLUSTER[-1]}"
        )
    try:
        code = await _serve(worker, orders, config.graceful_termination_timeout_s, began)
    finally:
        freed = await worker.stop()
    if not freed:
        # The engine is being loaded, or inside a step that does not end; the thread must not run
        # into the interpreter's own end.
        sys.stderr.flush()
        os._exit(code or (0 if worker.loading else EXIT_LOST))
    return code


def _warn(message: str) -> None:
    tell("warning", message=message)


def _cluster(config: WorkerConfig) -> Identity | None:
    """By what routers and this worker know each other. Raises ``TlsError``."""
    return None if config.cluster is None else Identity(config.cluster, _warn)


def _make(config: WorkerConfig) -> Engine:
    """Loads the engine; runs on the engine thread, when the worker listens."""
    # Our gRPC has read it by now. An engine's own, as JAX has one, is to be as that knows it.
    os.environ.pop(EXPERIMENTS, None)
    told = -1.0

    def progress(fraction: float) -> None:
        nonlocal told
        if fraction >= told + PROGRESS_STEP or fraction >= 1.0 > told:
            told = fraction
            tell("loading", fraction=round(fraction, 3))

    return engines.load(config.engine, config.options, progress)


def _overrides(config: WorkerConfig) -> dict[str, bytes]:
    """Tokenizer files that take the place of the model's own; runs on the engine thread."""
    path = config.chat_template
    if path is None:
        return {}
    try:
        return {"chat_template.jinja": path.read_bytes()}
    except OSError as error:
        raise ModelError(f"chat template {path}: {error.strerror}") from error


async def _serve(worker: Worker, orders: _Orders, limit_s: float, began: float) -> int:
    """Waits for the model, then for a reason to end; returns the exit code."""
    obeyed = asyncio.create_task(_obey(worker, orders, limit_s), name="orders")
    ready = asyncio.create_task(worker.ready(), name="ready")
    lost = asyncio.create_task(worker.lost(), name="lost")
    try:
        await asyncio.wait((obeyed, ready), return_when=asyncio.FIRST_COMPLETED)
        if obeyed.done():
            return 0
        try:
            loaded = ready.result()
        except ModelError as error:
            tell("error", message=str(error))
            return EXIT_NOT_READY
        for warning in loaded.info.warnings:
            _warn(warning)
        seconds = round(time.monotonic() - began, 3)
        tell("ready", address=worker.address, seconds=seconds)
        orders.manager.ready(f"at {worker.address}")
        await asyncio.wait((obeyed, lost), return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            tell("error", message=lost.result())
            return EXIT_LOST
        return 0
    finally:
        for task in (obeyed, ready, lost):
            task.cancel()
        await asyncio.gather(obeyed, ready, lost, return_exceptions=True)


async def _obey(worker: Worker, orders: _Orders, limit_s: float) -> None:
    """Waits until the worker is to stop: at an order to end, or when it has left in good order."""
    end = asyncio.create_task(orders.end.wait(), name="end")
    left = asyncio.create_task(_leave(worker, orders, limit_s), name="leave")
    try:
        await asyncio.wait((end, left), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (end, left):
            task.cancel()
        await asyncio.gather(end, left, return_exceptions=True)


async def _leave(worker: Worker, orders: _Orders, limit_s: float) -> None:
    """Waits for the order, and then for the router to have closed its stream, for so long."""
    await orders.leave.wait()
    orders.manager.stopping()
    if worker.streams:
        message = f"waiting up to {limit_s:g} s for the router to move or end what runs here"
        tell("leaving", message=message, limit_s=limit_s)
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await worker.leave()


def _watch_signals(leave: asyncio.Event) -> None:
    """The first SIGTERM, SIGINT or SIGHUP asks to leave; the second ends the process at once.

    A terminal that closes is told by the system and by a shell: SIGHUP is never a second one. It is
    ignored where ``nohup`` has it so.
    """

    def on_signal(number: int) -> None:
        if leave.is_set() and number == signal.SIGHUP:
            return
        if leave.is_set():
            os._exit(128 + number)
        leave.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)


def _watch_parent(end: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    """Ends when standard input does, as it does however the parent died."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(end.set)
        time.sleep(ORPHAN_S)
        os._exit(EXIT_LOST)

    threading.Thread(target=watch, name="parent", daemon=True).start()
