"""What a process shows of itself and whom it believes, as its files say at the time."""

import threading
from collections.abc import Callable
from pathlib import Path

from tls.doubts import doubt
from tls.files import Files, Material, TlsError, exposed, read

_Seen = tuple[int, int, int] | None


class Identity:
    """The certificate, key and CA in some files, which may be replaced at any time.

    ``warn`` gets a line if the key is open to other users, one whenever the members of a cluster
    would not believe each other, and one for each time that files were replaced by what cannot be
    used. May be used on any thread. Making one raises ``TlsError``.
    """

    def __init__(self, files: Files, warn: Callable[[str], None]) -> None:
        self._files = files
        self._warn = warn
        self._lock = threading.Lock()  # REST asks on its loop's thread, gRPC on others
        self._seen = self._look()
        self._material = read(files)
        if warning := exposed(files.key):
            warn(warning)
        self._doubt()

    def current(self) -> Material:
        """What the files hold; the last that could be used. Asked for at each new connection."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen  # before it is read: what changes meanwhile is read next time
                try:
                    self._material = read(self._files)
                except TlsError as error:
                    self._warn(f"{error}; the former certificate stays in use")
                else:
                    self._doubt()
            return self._material

    def _doubt(self) -> None:
        if self._files.cluster and (warning := doubt(self._files, self._material)):
            self._warn(warning)

    def _look(self) -> tuple[_Seen, ...]:
        """What tells a file from the one that was there before."""
        return tuple(map(_seen, (self._files.cert, self._files.key, self._files.ca)))


def _seen(path: Path | None) -> _Seen:
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None
