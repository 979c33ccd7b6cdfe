"""In which order groups join when they come up together.

Of two groups that cannot serve together, as their vocabularies differ, it is always the later one
in the order of the configuration that is refused, whichever of them is faster.
"""

import asyncio
from collections.abc import Iterable

from router.config import GroupSpec

WAIT_S = 10.0
"""How long a group that could come up waits at most: one before it may never do."""


class Turns:
    """Which groups have had their turn: they have joined, or a first attempt has failed."""

    def __init__(self, specs: Iterable[GroupSpec]) -> None:
        self._specs: tuple[GroupSpec, ...] = ()
        self._over: dict[str, asyncio.Event] = {}
        for spec in specs:
            self.add(spec)

    def add(self, spec: GroupSpec) -> None:
        """A group whose turn comes behind that of the others."""
        if spec.name in self._over:
            self.remove(spec.name)
        self._specs = (*self._specs, spec)
        self._over[spec.name] = asyncio.Event()

    def remove(self, name: str) -> None:
        """Nobody waits for this group any more."""
        self.over(name)
        self._specs = tuple(spec for spec in self._specs if spec.name != name)
        del self._over[name]

    def over(self, name: str) -> None:
        """This group has had its turn."""
        if name in self._over:
            self._over[name].set()

    async def wait(self, name: str, model: str) -> None:
        """Waits until all groups before this one that may be of its model have had theirs."""
        try:
            async with asyncio.timeout(WAIT_S):
                for spec in self._specs:
                    if spec.name == name:
                        return
                    if spec.model in (None, model) and spec.name in self._over:
                        await self._over[spec.name].wait()
        except TimeoutError:
            return
