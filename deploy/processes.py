"""One worker process: its lines, its end, and the end of everything that it has started."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Self, cast

# Longest line that is passed on in one piece, in bytes.
LINE_MAX = 1 << 16
# How long the last lines of a process that has ended may take to come.
LAST_WORDS_S = 1.0
_STDIN, _STDERR = 0, 2


class WorkerProcess(asyncio.SubprocessProtocol):
    """A process in a session of its own, from start to end. ``hear`` gets each line of its stderr.

    Its standard input stays open for as long as it is wanted.

    Not ``asyncio.create_subprocess_exec``: the processes that a worker starts inherit its standard
    error, and asyncio says that a process has ended when that is closed. A worker that was killed
    beside a compiler of its own would seem alive.
    """

    def __init__(self, hear: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self._hear = hear
        self._rest = b""
        self._exited: asyncio.Future[int] = loop.create_future()
        self._silent: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(
        cls, command: Sequence[str], env: Mapping[str, str] | None, hear: Callable[[str], None]
    ) -> Self:
        """Starts the command. Raises ``OSError`` if it cannot be run."""
        _, process = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(hear),
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.stderr.fileno(),
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=env,
        )
        return process

    async def ended(self) -> int:
        """Waits for the process's end, and ends what it has started; returns its exit status."""
        code = await asyncio.shield(self._exited)
        self.kill()
        await asyncio.wait([self._silent], timeout=LAST_WORDS_S)
        return code

    async def end(self, grace_s: float) -> None:
        """Makes it leave: closes its input, asks, and kills it and its children after a while."""
        transport = self._transport
        assert transport is not None, "start() returns a connected process"
        if not self._exited.done():
            if (stdin := transport.get_pipe_transport(_STDIN)) is not None:
                stdin.close()
            with contextlib.suppress(ProcessLookupError):
                transport.terminate()
            await asyncio.wait([self._exited], timeout=grace_s)
            self.kill()
        await self.ended()
        transport.close()

    def kill(self) -> None:
        """Kills the process, if it still runs, and every process that it has left behind.

        They are of the group that has the process's id, which is not given out anew while there is
        one of them, nor within the moment since its end.
        """
        assert self._transport is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._transport.get_pid(), signal.SIGKILL)

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The process runs."""
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """It has said something."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._say(line)
        if len(self._rest) >= LINE_MAX:
            self._say(self._rest)
            self._rest = b""

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """It, and all who share its standard error, have said their last."""
        if fd != _STDERR:
            return
        if self._rest:
            self._say(self._rest)
        if not self._silent.done():
            self._silent.set_result(None)

    def process_exited(self) -> None:
        """It has ended."""
        assert self._transport is not None
        code = self._transport.get_returncode()
        assert code is not None, "a process that has ended has a status"
        self._exited.set_result(code)

    def _say(self, line: bytes) -> None:
        self._hear(line.decode(errors="replace").rstrip())
