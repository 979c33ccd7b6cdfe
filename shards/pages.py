"""Where the pages of the documentation are that messages name."""

import sysconfig
from pathlib import Path

_CHECKOUT = Path(__file__).parents[1]
# pyproject.toml says so of wheels.
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "doc" / "roundhouse-llm"


def page(name: str) -> str:
    """A page by its name within ``docs``: as a checkout has it, or where an installation does."""
    in_checkout, installed = f"docs/{name}", _INSTALLED / name
    if not (_CHECKOUT / in_checkout).is_file() and installed.is_file():
        return str(installed)
    return in_checkout
