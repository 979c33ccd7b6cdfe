"""Which Python runs an engine: engines have conflicting needs, so each may have its own."""

import os
import sys
from pathlib import Path

from deploy.environment import STAMP


def home() -> Path:
    """Where Roundhouse keeps what it installs: ``$ROUNDHOUSE_HOME``, or the user's data folder."""
    given = os.environ.get("ROUNDHOUSE_HOME")
    return Path(given).expanduser() if given else Path.home() / ".local" / "share" / "roundhouse"


def environment_of(engine: str) -> Path:
    """The folder of the engine's own virtual environment, whether or not it exists."""
    return home() / "engines" / engine


def installed_apart(engine: str) -> bool:
    """Whether the engine has a complete environment of its own: half of one is not used."""
    return (environment_of(engine) / STAMP).is_file()


def interpreter_of(engine: str) -> str:
    """The Python of the engine's own environment if there is one, or else this one."""
    own = environment_of(engine) / "bin" / "python"
    return str(own) if installed_apart(engine) and own.is_file() else sys.executable
