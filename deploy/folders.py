"""Folders for sockets and the like that are gone when their process is, also if it was killed.

Each is locked for as long as the process lives that made it. The next process that makes one
removes those of its user that nobody has locked: the kernel unlocks them however a process ends,
and what a process starts does not inherit the lock.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Other programs' folders may begin like ours, and end otherwise.
PREFIX, SUFFIX = "roundhouse-", ".run"


@contextmanager
def folder_for_run(place: str = "") -> Iterator[Path]:
    """A new folder that only this user can enter, removed at the end with all that is in it.

    It is in ``place``; "": in the system's folder for such.
    """
    place = place or tempfile.gettempdir()
    _remove_stale(Path(place))
    folder, lock = _locked_folder(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(place: str) -> tuple[Path, int]:
    """Another process may find a folder before it is locked, and remove it; then one more."""
    while True:
        folder = Path(tempfile.mkdtemp(SUFFIX, PREFIX, place))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            if _locks(lock, folder):
                return folder, lock
            os.close(lock)


def _locks(lock: int, folder: Path) -> bool:
    """Locks a folder, unless somebody has; says whether it is there still."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.path.samestat(os.fstat(lock), folder.lstat())


def _remove_stale(place: Path) -> None:
    """Removes the folders of processes that have ended without doing so."""
    for folder in place.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(OSError):  # it has gone meanwhile, or is no folder of ours
            if folder.lstat().st_uid != os.geteuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if _locks(lock, folder):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
