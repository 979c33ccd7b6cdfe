"""LoRA adapters, from what the user typed to files on this machine."""

from collections.abc import Iterable
from pathlib import Path

from deploy.models import HUB_ID, ModelNotFound, reads_gguf_only
from shards.interrupts import quietly


def find_adapters(engine: str, pairs: Iterable[str], tgi: str) -> tuple[str, ...]:
    """NAME=PATH of every adapter, downloaded if it is on the hub. Raises ``ModelNotFound``.

    ``pairs`` are NAME=PATH or NAME=ID. ``tgi`` is TGI's list, joined by commas, whose entries may
    also be an ID or a PATH alone, which is then the name as well. An ID may have a @REVISION.
    """
    found: dict[str, str] = {}
    entries = [(pair.partition("=")) for pair in pairs]
    for name, equals, place in entries:
        if not name or not equals or not place:
            raise ModelNotFound(f"--adapter {name}{equals}{place} is not NAME=PATH")
    entries += [text.partition("=") for text in (part.strip() for part in tgi.split(",")) if text]
    for name, equals, place in entries:
        if name in found:
            raise ModelNotFound(f"two adapters are called {name}")
        found[name] = str(_locate(engine, name, place if equals else name))
    return tuple(f"{name}={path}" for name, path in found.items())


def _locate(engine: str, name: str, place: str) -> Path:
    """The adapter's file or folder."""
    path = Path(place).expanduser()
    if path.exists():
        return path
    hub_id, _, revision = place.partition("@")
    if not HUB_ID.fullmatch(hub_id) or "/" not in hub_id or place.startswith("."):
        raise ModelNotFound(f"adapter {name}: {place} does not exist")
    with quietly():
        from deploy import hub  # takes half a second to import, and is rarely needed

    return hub.fetch_adapter(hub_id, revision or None, gguf=reads_gguf_only(engine))
