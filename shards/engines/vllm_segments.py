"""Removes the shared memory that killed groups of vLLM's CPU ranks left on this host."""

import errno
import re
import socket
from contextlib import suppress
from pathlib import Path

# Where shm_open puts segments on Linux.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# As vllm/distributed/device_communicators/cpu_communicator.py makes them, for a tcp:// method.
_SEGMENT = re.compile(r"([0-9]{1,5})-(tp|pp)[^/]*-cpushm")


def sweep(folder: Path = SHARED_MEMORY) -> None:
    """Removes the segments of groups that are gone.

    A group that lives listens at the port that its segments are named after.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        segment = _SEGMENT.match(path.name)
        if segment and _is_free(int(segment[1])):
            with suppress(OSError):  # another user's, or another rank was faster
                path.unlink()


def is_segment_of(name: str, port: int) -> bool:
    """Whether shared memory of that name belongs to the group whose store is at the port."""
    segment = _SEGMENT.match(name)
    return segment is not None and int(segment[1]) == port


def _is_free(port: int) -> bool:
    """Whether nobody listens at the port, on any address."""
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
                probe.listen()
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    return False
    return True
