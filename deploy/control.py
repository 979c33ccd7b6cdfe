"""Where a server listens to whoever runs it: a unix socket that is called as its port of REST."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A unix socket's path may have 104 bytes on macOS and 108 on Linux.
SOCKET_PATH_MAX = 100
FOLDER = "ROUNDHOUSE_CONTROL"
"""The environment variable that names the folder of the sockets, for servers and commands alike."""


def control_socket(port: int) -> Path:
    """Where the server on this port is to listen. Raises ``OSError``, with one line, if it cannot.

    Its folder is ``$ROUNDHOUSE_CONTROL``, or else one of the user's own, in ``$XDG_RUNTIME_DIR``
    or, where there is none, in the system's folder for temporary files.
    """
    path = next(_sockets(port))
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX:
        raise OSError(
            f"{path} has {length} bytes, and the path of a socket may have {SOCKET_PATH_MAX}: let "
            f"{FOLDER} name a folder with a shorter one"
        )
    return path


def find_socket(port: int) -> Path:
    """Where the server on this port listens, as far as can be seen; otherwise ``control_socket``.

    A server may have been started where there was no ``$XDG_RUNTIME_DIR``.
    """
    return next(filter(os.path.lexists, _sockets(port)), None) or control_socket(port)


def _sockets(port: int) -> Iterator[Path]:
    """The places where the socket may be, the right one first."""
    return (folder / f"{port}.sock" for folder in _folders())


def _folders() -> Iterator[Path]:
    if given := os.environ.get(FOLDER):
        yield Path(given).absolute()
        return
    if (runtime := os.environ.get("XDG_RUNTIME_DIR")) and _own(runtime):
        yield Path(runtime).absolute() / "roundhouse"
    yield Path(tempfile.gettempdir()) / f"roundhouse-{os.geteuid()}"


def _own(folder: str) -> bool:
    """Whether it is there and this user's: who has become another one may have the former's."""
    try:
        return Path(folder).stat().st_uid == os.geteuid()
    except OSError:
        return False
