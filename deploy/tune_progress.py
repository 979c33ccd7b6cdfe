"""What ``roundhouse tune`` says while it is at work: lines that stay, and one that counts up."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TextIO

# How often one hears that something goes on: on a terminal in a line that is written over, in a
# file in lines of their own.
TERMINAL_S, FILE_S = 1.0, 10.0
_ERASE = "\r\033[K"


class Progress:
    """Writes to a terminal or a file, which is usually standard error."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._write((_ERASE if self._terminal else "") + f"tune: {line}\n")

    @asynccontextmanager
    async def during(self, now: Callable[[], str]) -> AsyncIterator[None]:
        """Shows, for as long as the block lasts, what ``now`` says, and for how long already."""
        ticking = asyncio.create_task(self._tick(now), name="progress")
        try:
            yield
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            if self._terminal:
                self._write(_ERASE)

    async def _tick(self, now: Callable[[], str]) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(TERMINAL_S if self._terminal else FILE_S)
            line = f"tune:   {now()}, {time.monotonic() - began:.0f} s"
            if self._terminal:
                # A line that is longer than the window could not be written over.
                line = _ERASE + line[: shutil.get_terminal_size().columns - 1]
            self._write(line if self._terminal else f"{line}\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
