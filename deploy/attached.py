"""``python -m deploy.attached ...``: ``roundhouse ...`` for as long as standard input is open.

For a program that starts a server for itself, with a pipe as its standard input. However that
program ends, ``kill -9`` included, the pipe closes; then the server leaves as after a SIGTERM, and
is ended if it does not.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from deploy.cli import main

# How long it may take to leave; whoever asked it something is gone by then.
LEAVE_S = 5.0
EXIT_LEFT_ALONE = 3


def watch_input() -> None:
    """Waits, in a thread of its own, for the end of standard input, and then ends this process."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LEAVE_S)
        os._exit(EXIT_LEFT_ALONE)

    threading.Thread(target=watch, name="input", daemon=True).start()


if __name__ == "__main__":
    watch_input()
    main()
