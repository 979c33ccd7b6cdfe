"""How the router's log lines look: plain, or one JSON object each. They go to standard error."""

import json
import logging
import os
import queue
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime

from router.config import Settings

FIELDS = "fields"
"""The attribute of a record that has more to say of it: texts and numbers, by name."""

LINES_MAX = 10_000
"""Lines that may wait to be written: what a thousand requests say, ten times over."""

LAST_LINES_S = 1.0


class PlainLines(logging.Formatter):
    """Time, level, logger and message, then the fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        fields: dict[str, object] = getattr(record, FIELDS, {})
        return " ".join(
            [super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())]
        )


class JsonLines(logging.Formatter):
    """One JSON object per line: timestamp, level, target, message, and fields and error if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        if fields := getattr(record, FIELDS, None):
            line[FIELDS] = fields
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Aside(logging.Handler):
    """Writes lines to a file descriptor on a thread of its own, which alone waits for their reader.

    A terminal that is held, or a collector that has stopped, would otherwise hold up every stream.
    What does not fit into ``LINES_MAX`` waiting lines is left out, and how many there were is said
    when there is room again.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(LINES_MAX)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Puts a line into the queue. Never waits."""
        try:
            if self._left_out:
                self._put(self._gap(record))
                self._left_out = 0
            self._put(record)
        except queue.Full:
            self._left_out += 1
        except Exception:  # noqa: BLE001 - as all handlers: a line must not end what it tells of
            self.handleError(record)

    def close(self) -> None:
        """Gives the lines that wait a moment to be written; called at the end of the process."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(LAST_LINES_S)
        super().close()

    def _put(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        self._lines.put_nowait(line.encode(errors="backslashreplace"))

    def _gap(self, record: logging.LogRecord) -> logging.LogRecord:
        text = f"{self._left_out} lines were left out: nobody read them in time"
        return logging.LogRecord(record.name, logging.WARNING, "", 0, text, None, None)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError):  # a full disk, or a reader that has gone
                while line:
                    line = line[os.write(self._descriptor, line) :]


def formatter(*, as_json: bool) -> logging.Formatter:
    """What makes a line of a record."""
    return JsonLines() if as_json else PlainLines()


def configure(settings: Settings) -> None:
    """Sets up logging as the settings say, unless the program has set it up already."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = Aside(sys.stderr.fileno())
    handler.setFormatter(formatter(as_json=settings.json_output))
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    # The server's own start and stop lines would say again what the router says.
    logging.getLogger("uvicorn").setLevel(max(root.level, logging.WARNING))
