"""Compiling beside the log of plans: off the event loop, off the engine thread, a few at once.

Equal constraints that are asked for at the same time are compiled once. A call that is cancelled
leaves the compiling to itself: what comes of it is kept for the next one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from shards.engines.base import Constraint, FeatureError
from shards.grammar import ConstraintError, Grammar, start_thread

RUNNING_MAX = 2
"""Compilers that run at once: one that takes long does not hold up all others."""
WAITING_MAX = 64
"""Constraints that are being compiled or wait for it."""


class TooManyError(Exception):
    """Too many constraints wait to be compiled already; the text is one line."""


_Answer = ConstraintError | TooManyError | None


class GrammarQueue:
    """All methods are called on the loop. ``grammar`` is None if the engine follows no constraints.

    The compiling is done by threads that are daemons, so that none of them holds the exit.
    """

    def __init__(self, grammar: Grammar | None, name: str) -> None:
        self._grammar = grammar
        self._name = name
        self._waiting: deque[Constraint] = deque()
        self._answers: dict[Constraint, asyncio.Future[_Answer]] = {}
        self._running = 0

    async def prepare(self, constraint: Constraint) -> None:
        """Has a constraint compiled and kept.

        Raises ``ConstraintError``, ``TooManyError``, and ``FeatureError`` if the engine cannot.
        """
        if constraint not in self._answers and len(self._answers) >= WAITING_MAX:
            text = f"{WAITING_MAX} constraints wait to be compiled already; try again later"
            raise TooManyError(text)
        await self._compiled(constraint)

    async def prepare_all(self, constraints: Iterable[Constraint]) -> None:
        """Has the constraints of a plan compiled, if they are not kept, before it is queued.

        What goes wrong is told by the engine, of the sequence that it concerns.
        """
        for constraint in constraints:
            if self._grammar is not None and not self._grammar.knows(constraint):
                try:
                    await self._compiled(constraint)
                except (ConstraintError, TooManyError):
                    continue

    async def _compiled(self, constraint: Constraint) -> None:
        if self._grammar is None:
            raise FeatureError(f"engine {self._name} does not support grammar")
        answer = self._answers.get(constraint)
        if answer is None:
            answer = self._answers[constraint] = asyncio.get_running_loop().create_future()
            self._waiting.append(constraint)
            self._next()
        error = await asyncio.shield(answer)
        if error is not None:
            raise type(error)(str(error))

    def _next(self) -> None:
        assert self._grammar is not None, "only then something waits"
        while self._waiting and self._running < RUNNING_MAX:
            constraint = self._waiting.popleft()
            self._running += 1
            loop = asyncio.get_running_loop()
            start_thread(_compile, self._grammar, constraint, loop, self._done, name="compiler")

    def _done(self, constraint: Constraint, answer: _Answer) -> None:
        self._running -= 1
        self._answers.pop(constraint).set_result(answer)
        self._next()


def _compile(
    grammar: Grammar,
    constraint: Constraint,
    loop: asyncio.AbstractEventLoop,
    done: Callable[[Constraint, _Answer], None],
) -> None:
    """Compiles on a thread of its own."""
    answer: _Answer = None
    try:
        grammar.matcher(constraint)
    except ConstraintError as error:
        answer = error
    except BaseException as error:  # noqa: BLE001 - whoever waits must be answered
        answer = TooManyError(f"no constraint can be compiled now: {error}; try again later")
    try:
        loop.call_soon_threadsafe(done, constraint, answer)
    except RuntimeError:
        if not loop.is_closed():
            raise
