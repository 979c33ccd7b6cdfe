"""Constraints are compiled by every worker that may follow them before a request is submitted.

So compiling stalls no step, and what cannot be compiled is refused as what it is, a fault of the
request. Which worker has compiled what is remembered: a schema that comes again costs no round
trip. A worker that has forgotten it, or has come up since, compiles it when a sequence comes. If
it cannot, the sequence fails there, and only ``blame`` tells whose fault that is. So does one whose
constraint compiles and becomes too large to follow later in the answer.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

from router.ask import Ask, Constraint
from router.config import Settings
from router.errors import Fault, RequestError
from router.fleet import Fleet, PrepareCall
from router.link import LinkDownError
from router.together import all_of
from router.validation import constraint_of
from shards.v1 import shard_pb2

KNOWN_MAX = 4096
"""Pairs of a group and a constraint that are remembered. Workers keep 256 constraints each."""
DEADLINE_S = 60.0
"""What preparing may take if nobody sets a shorter time; a worker gives a constraint up sooner."""

PARTS_S = 5.0
"""What it may take to find the part of a constraint that cannot be compiled."""

TOO_COSTLY = "the constraint became too expensive to follow"
"""How a worker tells of an answer on whose way the constraint grew too large: in the words of
``shards/grammar_masks.py``."""

Blame = Callable[[RequestError], Awaitable[RequestError]]
"""What to tell a client of the failure that broke an answer off."""

_Key = tuple[tuple[str, ...], bytes]
"""The instances of a group's ranks, and the digest of a constraint."""


class Preparer:
    """Has constraints compiled by the groups of a fleet."""

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._fleet = fleet
        self._settings = settings
        self._known: OrderedDict[_Key, None] = OrderedDict()
        self._busy: dict[_Key, asyncio.Future[Exception | None]] = {}
        self._open = 0

    async def prepare(self, model: str, ask: Ask) -> None:
        """Has the constraint of a request, if it has one, compiled by all groups that are up.

        A group that goes down meanwhile is left out. Raises RequestError: VALIDATION that says what
        cannot be compiled and where, OVERLOADED, DEADLINE.
        """
        constraint = ask.params.constraint
        if constraint is None:
            return
        try:
            await self._prepare(model, ask, constraint)
        except RequestError as error:
            raise await self._located(model, ask, constraint, error) from error

    async def _located(
        self, model: str, ask: Ask, constraint: Constraint, error: RequestError
    ) -> RequestError:
        """The refusal of the part that is at fault: the client has not seen the whole."""
        if error.fault is not Fault.VALIDATION or not constraint.parts:
            return error
        try:
            async with asyncio.timeout(PARTS_S):
                for part in constraint.parts:
                    await self._prepare(model, ask, part)
        except TimeoutError:
            return error
        except RequestError as refused:
            return refused if refused.fault is Fault.VALIDATION else error
        return error

    async def _prepare(self, model: str, ask: Ask, constraint: Constraint) -> None:
        """As ``prepare``, for one constraint."""
        wire = constraint_of(constraint)
        digest = hashlib.sha256(wire.SerializeToString(deterministic=True)).digest()
        calls = {
            (instances, digest): call
            for instances, call in self._fleet.prepare_calls(model).items()
            if not self._knows((instances, digest))
        }
        if not calls:
            return
        most = self._settings.max_concurrent_requests
        if self._open >= most:
            text = f"{most} requests wait for their constraints to be compiled; try again later"
            raise RequestError(Fault.OVERLOADED, text)
        self._open += 1
        try:
            async with asyncio.timeout(self._limit_s(ask)):
                await all_of(self._once(key, call, wire) for key, call in calls.items())
        except TimeoutError:
            text = "the deadline passed before the constraint was compiled"
            raise RequestError(Fault.DEADLINE, text) from None
        except RequestError as error:
            raise _refusal(error, constraint) from error
        finally:
            self._open -= 1

    def blame(self, model: str, ask: Ask) -> Blame:
        """For a request that was submitted, perhaps while no group was up to compile for it."""
        return partial(self._blamed, model, ask)

    async def _blamed(self, model: str, ask: Ask, error: RequestError) -> RequestError:
        constraint = ask.params.constraint
        if error.fault is not Fault.ENGINE_FAILED or constraint is None:
            return error
        if error.message.startswith(TOO_COSTLY):
            text = error.message.replace("the constraint", f"`{constraint.field}`", 1)
            return _counted_as(error, RequestError(Fault.VALIDATION, text, constraint.field))
        try:
            await self.prepare(model, ask)
        except RequestError as refused:
            return _counted_as(error, refused) if refused.fault is Fault.VALIDATION else error
        return error

    def _limit_s(self, ask: Ask) -> float:
        given = (ask.deadline_s, self._settings.request_deadline_s, DEADLINE_S)
        return min(seconds for seconds in given if seconds is not None)

    def _knows(self, key: _Key) -> bool:
        if key in self._known:
            self._known.move_to_end(key)
            return True
        return False

    async def _once(self, key: _Key, call: PrepareCall, wire: shard_pb2.Constraint) -> None:
        """Asks one group, or waits for another request that does. Raises RequestError."""
        while (busy := self._busy.get(key)) is not None:
            await asyncio.wait([busy])
            # Whoever asked may have been cancelled; then it is for one of those who wait to ask.
            if not busy.cancelled():
                error = busy.result()
                if isinstance(error, RequestError):
                    raise RequestError(error.fault, error.message)
                return
        busy = self._busy[key] = asyncio.get_running_loop().create_future()
        try:
            await call(wire)
        except LinkDownError as error:
            busy.set_result(error)
        except RequestError as error:
            busy.set_result(error)
            raise
        else:
            busy.set_result(None)
            self._remember(key)
        finally:
            busy.cancel()
            del self._busy[key]

    def _remember(self, key: _Key) -> None:
        self._known[key] = None
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)


def _counted_as(error: RequestError, other: RequestError) -> RequestError:
    other.counted = error.counted
    return other


def _refusal(error: RequestError, constraint: Constraint) -> RequestError:
    """What the client is told: its own name of the parameter, and what the worker said."""
    if error.fault is not Fault.VALIDATION:
        return error
    text = f"`{constraint.field}` cannot be compiled: {error.message}"
    return RequestError(Fault.VALIDATION, text, constraint.field)
