"""A server for one candidate: ``roundhouse serve --config`` as a process of its own.

The file with which it is started is of the very form that the winner's is.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.environment import last_line
from deploy.tune_load import Address

# How long a server may take to leave; nobody waits for an answer by then.
LEAVE_S = 5.0
ERROR = "roundhouse: error: "


class ServerError(Exception):
    """The server did not come up. The text is its own one line."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready, and how long it took, in seconds."""

    address: Address
    load_s: float


@asynccontextmanager
async def serving(config: Path, log: Path) -> AsyncIterator[Served]:
    """Runs the server while the block lasts. Its end, however the block ends, is waited for.

    Raises ``ServerError`` if it ends before it is ready; a deadline is the caller's.
    """
    command = [sys.executable, "-P", "-m", "deploy.attached", "serve", "--config", str(config)]
    command += ["--hostname", "127.0.0.1", "--port", "0", "--grpc-port", "0", "--json-output"]
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
        address = await _ready(process, log)
        yield Served(address, time.monotonic() - began)
    finally:
        await _end(process)


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would be an option of the server."""
    from deploy.cli import serve  # which imports this command

    options = {str(param.envvar) for param in serve.params if param.envvar}
    return {key: value for key, value in env.items() if key not in options}


async def _ready(process: asyncio.subprocess.Process, log: Path) -> Address:
    """Waits for the line that says where it listens."""
    assert process.stdout is not None, "it was started with a pipe"
    async for line in process.stdout:
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if said.get("event") == "ready":
                host, _, port = said["rest"].removeprefix("http://").rpartition(":")
                return Address(host, int(port))
    await process.wait()
    reason = last_line(await asyncio.to_thread(log.read_text, errors="replace"))
    raise ServerError(reason.removeprefix(ERROR))


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
