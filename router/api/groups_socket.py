"""A unix socket that only the user who runs the server can open: the folder, and what is there."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

FOLDER_MODE, SOCKET_MODE = 0o700, 0o600
ANSWER_S = 1.0


def address_of(path: Path) -> str:
    """The socket as gRPC names it."""
    return f"unix:{quote(str(path))}"


def check_folder(folder: Path) -> None:
    """Raises ``OSError`` with one line unless the folder is there, this user's, and closed."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is not a folder")
    if found.st_uid != os.geteuid():
        raise OSError(f"the folder {folder} belongs to another user")
    if found.st_mode & 0o077:
        raise OSError(f"the folder {folder} is open to others; chmod 700 {folder} closes it")


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """A folder for a socket, where none is left of a server that has ended.

    Removes the folder at the end if it was made here and is empty. Raises ``OSError`` with one
    line.
    """
    made = _make(path.parent)
    try:
        check_folder(path.parent)
        _clear(path)
        yield
    finally:
        if made:
            with suppress(OSError):  # the socket of another server is there
                path.parent.rmdir()


def _make(folder: Path) -> bool:
    """Makes a folder unless there is something of that name."""
    try:
        folder.mkdir(FOLDER_MODE, parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}") from error
    return True


def _clear(path: Path) -> None:
    """Removes a socket where nobody listens any more."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise OSError(f"{path} is in the way, and is no socket")
    if _answers(path):
        raise OSError(f"another server listens on {path}")
    path.unlink()


def _answers(path: Path) -> bool:
    """Whether somebody listens on a socket; who is too busy to answer does, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
