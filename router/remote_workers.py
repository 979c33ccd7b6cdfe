"""Workers that run elsewhere, as ``router.change`` wants to have them: they are there, or not."""

import asyncio
from itertools import count
from random import Random
from time import monotonic

from router.change import ChangeError, Problem, Tell
from router.config import ConfigError, GroupSpec, check_groups
from router.link import Backoff, Link, LinkDownError, SilentError, UnreachableError
from router.together import all_of
from tls.identity import Identity

REACH_S = 10.0
"""How long nobody may listen at an address: the worker may just be starting."""


def remote_group(number: int, text: str) -> GroupSpec:
    """The ``number``-th group of a router: the addresses of its ranks, joined by commas."""
    return GroupSpec(f"group-{number}", None, tuple(filter(None, text.split(","))))


class RemoteWorkers:
    """``router.change.Workers`` of a router that began with ``groups`` of them.

    A group has a name that no other has had. Nobody but who has started the workers can end them.
    ``cluster`` is by what the router and they know each other; None: nothing is encrypted.
    """

    ends_them = False

    def __init__(self, groups: int, cluster: Identity | None = None) -> None:
        self._numbers = count(groups)
        self._cluster = cluster

    async def check(self, text: str, tell: Tell) -> None:
        """Looks at the addresses. Raises ``ChangeError``."""
        group = remote_group(0, text)
        if not group.addresses:
            raise ChangeError(
                Problem.INVALID,
                "give the address of a worker, host:port or unix:///path; those of several ranks "
                "joined by commas",
            )
        try:
            check_groups([group])
        except ConfigError as error:
            raise ChangeError(Problem.INVALID, str(error)) from None

    async def start(self, text: str, tell: Tell) -> GroupSpec:
        """Waits until all of them answer. Raises ``ChangeError`` if somebody is not there."""
        spec = remote_group(next(self._numbers), text)
        tell(f"{spec.name}: waiting for {', '.join(spec.addresses)}", 0.0)
        try:
            await all_of(self._answering(spec, address, tell) for address in spec.addresses)
        except LinkDownError as error:
            raise ChangeError(Problem.IMPOSSIBLE, str(error)) from None
        return spec

    async def end(self, name: str) -> None:
        """Leaves them to whoever has started them."""

    async def start_again(self, name: str, tell: Tell) -> GroupSpec:
        """Raises ``ChangeError``: this router has never started any."""
        raise ChangeError(Problem.IMPOSSIBLE, "its workers run elsewhere")

    async def _answering(self, spec: GroupSpec, address: str, tell: Tell) -> None:
        """Waits until a worker answers, as long as there is one. Raises ``LinkDownError``."""
        backoff, missed = Backoff(Random()), monotonic()  # noqa: S311
        while True:
            link = Link(address, 1, self._cluster)
            try:
                await link.describe()
            except UnreachableError:
                if monotonic() - missed > REACH_S:
                    raise
                await asyncio.sleep(backoff.pause_s())
            except SilentError:
                missed = monotonic()
                late = f"{address} does not answer yet: it may be loading its model"
                tell(f"{spec.name}: {late}", 0.0)
            else:
                return
            finally:
                await link.close()
