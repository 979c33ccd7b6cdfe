"""How the router's log lines look: plain, or one JSON object each. They go to standard error."""

import json
import logging
from datetime import UTC, datetime

from router.config import Settings


class JsonLines(logging.Formatter):
    """One JSON object per line: timestamp, level, target, message, and the error if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(settings: Settings) -> None:
    """Sets up logging as the settings say, unless the program has set it up already."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if settings.json_output else plain)
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    # The server's own start and stop lines would say again what the router says.
    logging.getLogger("uvicorn").setLevel(max(root.level, logging.WARNING))
