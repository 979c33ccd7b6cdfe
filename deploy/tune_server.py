"""A server for one candidate: ``roundhouse serve --config`` as a process of its own.

The file with which it is started is of the very form that the winner's is.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.environment import last_line
from deploy.tune_load import ANSWER_S, Address

# How long a server may take to leave; nobody waits for an answer by then.
LEAVE_S = 5.0
ERROR = "roundhouse: error: "
# How the server says that a worker has ended, and how far one has loaded; see ``console``.
DIED = re.compile(r"(.+?)(?: \(death \d+ in a row\))?; starting .+ again in [\d.]+ s")
LOADING = re.compile(r".+: loading, (\d+%)")
# How much of a log's end is read, in bytes.
TAIL = 1 << 14


class ServerError(Exception):
    """The server did not come up. The text is its own one line."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready, how long it took, in seconds, and the element type it computes in."""

    address: Address
    load_s: float
    dtype: str


@asynccontextmanager
async def serving(config: Path, log: Path) -> AsyncIterator[Served]:
    """Runs the server while the block lasts. Its end, however the block ends, is waited for.

    Raises ``ServerError`` if it ends before it is ready; a deadline is the caller's.
    """
    command = [sys.executable, "-P", "-m", "deploy.attached", "serve", "--config", str(config)]
    command += ["--hostname", "127.0.0.1", "--port", "0", "--grpc-port", "0", "--json-output"]
    command += ["--no-resume-streams"]  # the loss of a worker is to fail a trial, not to slow it
    began = time.monotonic()
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # closes with this program, however it ends
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            env=clean(os.environ),
            # Ctrl-C is for this program, which ends the server itself.
            start_new_session=True,
        )
    try:
        address, grpc_address = await _ready(process, log)
        load_s = time.monotonic() - began
        yield Served(address, load_s, await _dtype(grpc_address))
    finally:
        await _end(process)


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would be an option of the server."""
    from deploy.serve_command import serve  # which takes time to import

    options = {str(param.envvar) for param in serve.params if param.envvar}
    return {key: value for key, value in env.items() if key not in options}


def loaded_share(log: Path) -> list[str]:
    """How far a worker has loaded, as the server said it last; empty if it has said nothing."""
    return [found[1] for found in map(LOADING.fullmatch, messages(log)) if found][-1:]


def last_trouble(log: Path) -> str:
    """Which worker ended last, and why; or else what the router says went wrong; "" if nothing."""
    deaths = [found[1] for found in map(DIED.fullmatch, messages(log)) if found]
    errors = [_error(said) for said in _said(log) if said.get("level") == "ERROR"]
    return next(iter((*deaths[-1:], *errors[-1:])), "")


def last_words(log: Path) -> str:
    """Why the server has ended: what it said last, which may be no object if it broke down."""
    said = [one for one in _said(log) if one.get("message")]
    return _error(said[-1]).removeprefix(ERROR) if said else "no output"


def messages(log: Path) -> list[str]:
    """The latest lines that the server has said, without what is around them."""
    return [str(said.get("message", "")) for said in _said(log)]


def _error(said: Mapping[str, Any]) -> str:
    """A message, with the end of its traceback if it has one."""
    cause = last_line(str(said["error"])) if "error" in said else ""
    return ": ".join(filter(None, (str(said.get("message", "")), cause)))


def _said(log: Path) -> list[dict[str, Any]]:
    """The objects on the latest lines of a log; what is none is a message."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        return [_object(line) for line in file.read().decode(errors="replace").splitlines()]
    return []


def _object(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {"message": line}


async def _ready(process: asyncio.subprocess.Process, log: Path) -> tuple[Address, str]:
    """Waits for the line that says where it listens, with REST and with gRPC."""
    assert process.stdout is not None, "it was started with a pipe"
    async for line in process.stdout:
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if said.get("event") == "ready":
                host, _, port = said["rest"].removeprefix("http://").rpartition(":")
                return Address(host, int(port)), said["grpc"]
    await process.wait()
    raise ServerError(last_words(log))


async def _dtype(address: str) -> str:
    """What its only group says that it computes in. Raises ``ServerError``."""
    import grpc.aio

    from router.v1 import router_pb2, router_pb2_grpc

    try:
        async with grpc.aio.insecure_channel(address) as channel:
            ask = router_pb2_grpc.InferenceStub(channel).ListModels  # type: ignore[no-untyped-call]
            answer = await ask(router_pb2.ListModelsRequest(), timeout=ANSWER_S)
    except grpc.aio.AioRpcError as error:
        raise ServerError(f"the server does not list its models: {error.details()}") from error
    return str(answer.models[0].groups[0].dtype)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Asks the server to leave, then makes it. Its workers end with it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(LEAVE_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
