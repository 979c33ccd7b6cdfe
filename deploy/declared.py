"""What the project declares that it needs: from the checkout that this is, or else as installed."""

import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "roundhouse-llm"
# What a worker imports of the project's dependencies; the rest is the router's and the command's.
# It runs without uvloop too, and slower.
WORKER_NEEDS = (
    *("grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf"),
    *("llguidance", "numpy", "tokenizers", "uvloop"),
)


@dataclass(frozen=True, slots=True)
class Declared:
    """The project's version, requirements and extras, and where it comes from.

    ``checkout`` is the folder of its sources, or None if it was installed from an index.
    """

    version: str
    checkout: Path | None
    dependencies: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]

    def source(self) -> tuple[str, ...]:
        """How pip is told to install the project itself."""
        if self.checkout is not None:
            return ("--editable", str(self.checkout))
        return (f"{DISTRIBUTION}=={self.version}",)

    def worker_needs(self) -> list[str]:
        """The requirements of a worker without its engine."""
        return [one for one in self.dependencies if name_of(one) in WORKER_NEEDS]


def declared(root: Path = ROOT) -> Declared:
    """Reads ``pyproject.toml`` if it is there, or else what was installed with this program."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    except (OSError, KeyError):
        return _installed()
    extras = project.get("optional-dependencies", {})
    return Declared(
        project["version"],
        root,
        tuple(project.get("dependencies", ())),
        {name: tuple(needs) for name, needs in extras.items()},
    )


def _installed() -> Declared:
    """The same from the metadata of the installed distribution, which marks each extra's needs."""
    found = metadata.distribution(DISTRIBUTION)
    needs: dict[str, list[str]] = {}
    for line in found.requires or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"""(?:\s*and\s*)?extra\s*==\s*['"]([^'"]+)['"]""", marker)
        rest = marker.replace(extra[0], "").strip() if extra else marker
        kept = f"{requirement}; {rest}" if rest else requirement
        needs.setdefault(extra[1] if extra else "", []).append(kept)
    dependencies = tuple(needs.pop("", ()))
    extras = {name: tuple(lines) for name, lines in needs.items()}
    return Declared(found.version, None, dependencies, extras)


def name_of(requirement: str) -> str:
    """The name of a requirement's distribution, as indexes compare it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""
