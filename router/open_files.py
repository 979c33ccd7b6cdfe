"""How many connections a process may hold: each takes a file, and many systems allow 1,024."""

import logging
import resource
from contextlib import suppress

log = logging.getLogger(__name__)

FILES_MAX = 65_536
"""Asked for, if the system allows it."""
OWN_FILES = 256
"""What a process holds beside its clients' connections: workers, gateways, libraries; and some of
those clients' that are idle."""


def allow_files(requests: int, most: int = FILES_MAX) -> None:
    """Raises this process's limit of open files to ``most``, or what so many requests take.

    Warns if that is not allowed. Beyond the limit connections are closed as soon as they are made,
    without a word to anybody.
    """
    needed = requests + OWN_FILES
    allowed = _raised(max(most, needed))
    if allowed < needed:
        log.warning(
            "this process may open %d files, fewer than %d requests "
            "(--max-concurrent-requests) take: clients beyond will be cut off; raise the limit "
            "(ulimit -n, LimitNOFILE= of systemd)",
            allowed,
            requests,
        )


def _raised(wanted: int) -> int:
    """Makes the limit ``wanted``, or as much of it as is allowed; returns what it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
