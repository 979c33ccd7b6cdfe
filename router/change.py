"""What is asked of those who change groups, and of those who have the workers of groups."""

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from router.config import GroupSpec

Tell = Callable[[str, float], None]
"""Takes a line for a person, and how far the workers are with loading: 0 to 1, 0 if not known.

Never waits and never fails.
"""


class Problem(Enum):
    """Why a change is refused: what was asked for, a name nobody has, or the state of things."""

    INVALID = auto()
    UNKNOWN = auto()
    IMPOSSIBLE = auto()


class ChangeError(Exception):
    """A change that was refused or failed. The text is one line that says why."""

    def __init__(self, problem: Problem, line: str) -> None:
        super().__init__(line)
        self.problem = problem


class Workers(Protocol):
    """Who has the workers of groups: others, elsewhere, or processes on this machine.

    ``ends_them`` says which: whether ``end`` frees the devices that a group computes on, and
    ``start_again`` brings it back.
    """

    ends_them: bool

    async def check(self, text: str, tell: Tell) -> None:
        """Looks at the description of a group, and fetches what it needs, before anything changes.

        Raises ``ChangeError``.
        """

    async def start(self, text: str, tell: Tell) -> GroupSpec:
        """Starts the workers of a new group, which ``AddGroupRequest.group`` describes.

        Returns when they listen and have loaded. Raises ``ChangeError`` with the worker's own line
        if they cannot. Failed or cancelled, it leaves nothing behind.
        """

    async def end(self, name: str) -> None:
        """Ends the workers of a group, for good. Does nothing if there are none."""

    async def start_again(self, name: str, tell: Tell) -> GroupSpec:
        """Starts the workers of a group that was ended, as they were; otherwise as ``start``."""
