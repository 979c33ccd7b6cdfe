"""How the router's log lines look: plain, or one JSON object each. They go to standard error."""

import json
import logging
from datetime import UTC, datetime

from router.config import Settings

FIELDS = "fields"
"""The attribute of a record that has more to say of it: texts and numbers, by name."""


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


def formatter(*, as_json: bool) -> logging.Formatter:
    """What makes a line of a record."""
    return JsonLines() if as_json else PlainLines()


def configure(settings: Settings) -> None:
    """Sets up logging as the settings say, unless the program has set it up already."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(as_json=settings.json_output))
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    # The server's own start and stop lines would say again what the router says.
    logging.getLogger("uvicorn").setLevel(max(root.level, logging.WARNING))
