"""Ctrl-C while a program begins or ends: it ends at once, with 130, and says nothing.

Otherwise Python raises ``KeyboardInterrupt`` wherever it is. In the middle of an import nobody is
there to handle it: it becomes a traceback, or is lost in a callback. This module imports nothing
that takes time.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STATUS = 128 + signal.SIGINT


def end_quietly() -> None:
    """From now on Ctrl-C ends the process where it stands: it has nothing that must be tidied up.

    Unless it is to be ignored, as in a shell's background.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _set(_end)


def interrupt() -> None:
    """From now on Ctrl-C raises ``KeyboardInterrupt``, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        _set(signal.default_int_handler)


@contextmanager
def quietly() -> Iterator[None]:
    """While modules are imported: Ctrl-C ends the process where it stands."""
    former = signal.getsignal(signal.SIGINT)
    end_quietly()
    try:
        yield
    finally:
        if former is signal.default_int_handler:
            interrupt()


def _set(handler: Callable[[int, FrameType | None], None]) -> None:
    with suppress(ValueError):  # in another thread than the main one, which hears of no Ctrl-C
        signal.signal(signal.SIGINT, handler)


def _end(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\n")  # behind the ^C
    os._exit(STATUS)
