"""What the engines have in common that schedule themselves (``Scheduling.SELF``).

Such an engine takes requests and streams tokens at its own pace; the router's log of plans wants
exactly one token per step for every sequence that is due. Between the two stands this:

- A sequence becomes a request when its first token is scheduled, so that a prompt which the router
  computes in chunks is under way from its first chunk on. The chunks themselves are bookkeeping.
- A request asks for a *lease* of tokens only, never for the rest of the answer. So the engine runs
  ahead of the router by no more than a lease, holds no more memory than the router has accounted
  for plus one lease per sequence, and has no reason to queue what the router admits. The next lease
  is a new request with all tokens so far; the engine's own prefix cache makes that cheap.
- ``step`` waits, with a deadline, until each sequence that is due has its next token; what the
  engine has made ahead lies in the sequence's buffer, which a lease bounds.
- A drop cancels the request, whose task then aborts it in the engine.

A sequence that comes back after a loss starts with a lease of all its tokens. Whatever depends on
which of the tokens were generated (penalties) would then be wrong, so it is no feature of these
engines. ``min_tokens`` is exact: while stop tokens are barred, a lease ends where the bar does.
"""

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count

from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineLost,
    Logprobs,
    Outcome,
    Plan,
    PlanError,
    SamplingParams,
    undeclared,
)
from shards.engines.self_loop import LoopThread
from shards.residents import Limits, Resident, Residents

LEASE_TOKENS = 128
# Less than the router's own deadline for a step, so that the worker says what is wrong.
ANSWER_S = 50.0
CLOSE_S = 30.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to the engine: up to ``count`` tokens behind ``tokens``.

    None of ``barred`` may be drawn; if it is empty, the engine ends the request behind the first of
    ``sampling.stop_tokens``, which it returns. ``key`` is unique over the life of the engine.
    """

    key: str
    tokens: Sequence[int]
    count: int
    sampling: SamplingParams
    barred: tuple[int, ...] = ()
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """What the engine drew at one position."""

    token: int
    logprobs: Logprobs | None = None


class RequestFailed(Exception):
    """The engine cannot go on with one request; the others are not affected. One line."""


class Backend(ABC):
    """An engine with a loop of its own. All methods are called on the thread of one event loop."""

    @abstractmethod
    def start(self, loop: asyncio.AbstractEventLoop) -> EngineInfo:
        """Loads the model; the loop does not run yet. Raises ``ModelError`` with one line."""

    @abstractmethod
    def generate(self, ask: Ask) -> AsyncGenerator[list[Token], None]:
        """An asynchronous generator of the tokens of one request, in pieces as they come.

        Closing it, or cancelling whoever waits for it, aborts the request. Raises ``RequestFailed``
        if only this request is at fault; any other exception is the loss of the engine.
        """

    def unable(self, sampling: SamplingParams) -> str:
        """Why the engine cannot honour what no feature stands for, in one line; or nothing."""
        return ""

    def stop(self) -> None:
        """Ends the engine. The loop does not run any more."""


@dataclass(slots=True, eq=False)
class _Lease:
    """One request of one sequence. Ended without a token, it has a ``failure``."""

    ask: Ask
    live: bool = True
    made: int = 0
    failure: str = ""


@dataclass(slots=True, eq=False)
class _Lane:
    """What the engine does for one resident sequence.

    The engine's condition guards it, but for ``task``, which belongs to the loop. ``refusal`` is
    why the sequence cannot be served at all.
    """

    resident: Resident
    refusal: str = ""
    ready: deque[Token] = field(default_factory=deque)
    lease: _Lease | None = None
    wanted: bool = False
    task: "asyncio.Task[None] | None" = None

    @property
    def idle(self) -> bool:
        """Whether nothing is there, and nothing will come."""
        return not self.ready and (self.lease is None or not self.lease.live)

    @property
    def fault(self) -> str:
        """Why the sequence cannot go on, if that is so."""
        return self.refusal if self.lease is None else self.lease.failure


class SelfScheduledEngine(Engine):
    """Makes an engine that schedules itself keep the log of plans; see the module."""

    def __init__(
        self,
        backend: Backend,
        files: Callable[[], dict[str, bytes]],
        *,
        lease_tokens: int = LEASE_TOKENS,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._backend = backend
        self._files = files
        self._lease_tokens = lease_tokens
        self._answer_s = answer_s
        self._changed = threading.Condition()
        self._lanes: dict[int, _Lane] = {}
        self._missing = 0
        self._lost = ""
        self._serial = count(1)
        self._loop = LoopThread(backend.start, backend.stop)
        self._info = self._loop.started
        self._residents = Residents(_limits(self._info))

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """See ``Engine``."""
        return self._files()

    def step(self, plan: Plan) -> Outcome:
        """See ``Engine``. Sequences draw in the order of the plan's work."""
        self._check(plan)
        residents = self._residents
        left = [self._lanes.pop(residents.drop(sequence).sequence) for sequence in plan.drops]
        for admit in plan.admits:
            refusal = self._backend.unable(admit.sampling)
            self._lanes[admit.sequence] = _Lane(residents.admit(admit), refusal)
        outcome = Outcome()
        due: list[_Lane] = []
        begun: list[_Lane] = []
        for sequence, work in plan.work:
            lane = self._lanes[sequence]
            if lane.resident.failed:
                continue
            idle = self._is_idle(lane)
            if idle and lane.fault:
                _fail(lane, lane.fault, outcome)
                continue
            if idle:
                begun.append(lane)
            if residents.compute(lane.resident, work):
                due.append(lane)
        self._begin(begun, left)
        if due:
            self._wait(due)
            for lane in due:
                _collect(lane, outcome)
        return outcome

    def _check(self, plan: Plan) -> None:
        if self._lost:
            raise EngineLost(self._lost)
        for admit in plan.admits:
            if admit.share_len:
                raise PlanError(f"{self._info.engine} shares no prefixes by plan")
            lacking = _lacking(admit.sampling, admit.adapter, self._info)
            if lacking:
                name = self._info.engine
                raise PlanError(f"sequence {admit.sequence}: {name} does not support {lacking}")
        self._residents.check(plan)

    # Leases -------------------------------------------------------------------------------------

    def _is_idle(self, lane: _Lane) -> bool:
        with self._changed:
            return lane.idle

    def _begin(self, lanes: Sequence[_Lane], left: Sequence[_Lane] = ()) -> None:
        """Starts a lease for each of ``lanes``, and ends what those that left still ask for."""
        for lane in lanes:
            lane.lease = _Lease(self._ask(lane.resident))
        if lanes or left:
            begun = [(lane, lane.lease) for lane in lanes]
            self._loop.call(self._apply, left, begun)

    def _ask(self, resident: Resident) -> Ask:
        sampling, length = resident.sampling, len(resident.tokens)
        size = min(self._lease_tokens, self._info.length_max + 1 - length)
        missing = sampling.min_tokens - (length - resident.prompt_len)
        bars = missing > 0 and bool(sampling.stop_tokens)
        return Ask(
            key=f"roundhouse-{next(self._serial)}",
            tokens=list(resident.tokens),
            count=min(size, missing) if bars else size,
            sampling=sampling,
            barred=sampling.stop_tokens if bars else (),
            adapter=resident.adapter,
        )

    def _wait(self, due: Sequence[_Lane]) -> None:
        """Waits until each lane has a token or has failed. Raises ``EngineLost``.

        A lease that ended before it was used up, as one does behind a stop token, is followed by
        another.
        """
        deadline = time.monotonic() + self._answer_s
        while due:
            with self._changed:
                for lane in due:
                    if not lane.ready and not lane.idle:
                        lane.wanted = True
                        self._missing += 1
                self._changed.wait_for(
                    lambda: not self._missing or bool(self._lost), deadline - time.monotonic()
                )
                if self._missing and not self._lost:
                    self._lost = self._late([lane for lane in due if lane.wanted])
                if self._lost:
                    raise EngineLost(self._lost)
                due = [lane for lane in due if lane.idle and not lane.fault]
            self._begin(due)

    def _late(self, waiting: Sequence[_Lane]) -> str:
        return (
            f"{self._info.engine}: no token for {len(waiting)} sequences, the first being"
            f" {waiting[0].resident.sequence}, within {self._answer_s:g} s"
        )

    # On the loop --------------------------------------------------------------------------------

    def _apply(self, left: Sequence[_Lane], begun: Sequence[tuple[_Lane, _Lease]]) -> None:
        for lane in left:
            if lane.task is not None:
                lane.task.cancel()
        for lane, lease in begun:
            lane.task = self._loop.own(self._pump(lane, lease))

    async def _pump(self, lane: _Lane, lease: _Lease) -> None:
        """Moves the tokens of one request into its lane."""
        failure = ""
        try:
            async with aclosing(self._backend.generate(lease.ask)) as pieces:
                async for piece in pieces:
                    self._take(lane, lease, piece)
        except RequestFailed as error:
            failure = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine is not to be trusted
            with self._changed:
                self._lost = f"{self._info.engine} failed: {type(error).__name__}: {error}"
                self._changed.notify_all()
        finally:
            with self._changed:
                if not lease.made:
                    failure = failure or "the engine ended the request without a token"
                lease.live, lease.failure = False, failure
                self._satisfy(lane)

    def _take(self, lane: _Lane, lease: _Lease, piece: Sequence[Token]) -> None:
        lease.made += len(piece)
        if lease.made > lease.ask.count:
            raise RuntimeError(f"{lease.made} tokens came of {lease.ask.count} that were asked for")
        with self._changed:
            lane.ready.extend(piece)
            # The request may need a while to end; the next lease need not wait for that.
            lease.live = lease.made < lease.ask.count
            self._satisfy(lane)

    def _satisfy(self, lane: _Lane) -> None:
        """Tells the step that waits; the condition is held."""
        if lane.wanted and (lane.ready or lane.idle):
            lane.wanted = False
            self._missing -= 1
            if not self._missing:
                self._changed.notify_all()

    # Beginnings and ends ------------------------------------------------------------------------

    def reset(self) -> None:
        """See ``Engine``. Requests that do not end in time make the next step fail."""
        self._lanes.clear()
        self._residents.clear()
        if not self._loop.cancel_all(self._answer_s):
            self._lost = f"{self._info.engine}: requests did not end within {self._answer_s:g} s"
        with self._changed:
            self._missing = 0

    def close(self) -> None:
        """See ``Engine``."""
        self._loop.close(CLOSE_S)


def _collect(lane: _Lane, outcome: Outcome) -> None:
    """Makes the next token of a lane known to its sequence, and tells it."""
    resident = lane.resident
    if not lane.ready:
        _fail(lane, lane.fault, outcome)
        return
    drawn = lane.ready.popleft()
    resident.tokens.append(drawn.token)
    outcome.sequences.append(resident.sequence)
    outcome.tokens.append(drawn.token)
    if drawn.logprobs is not None:
        outcome.logprobs[resident.sequence] = drawn.logprobs


def _fail(lane: _Lane, why: str, outcome: Outcome) -> None:
    lane.resident.failed = True
    outcome.failures[lane.resident.sequence] = why


def _limits(info: EngineInfo) -> Limits:
    return Limits(
        kv_tokens=info.kv_tokens,
        page_tokens=info.page_tokens,
        sequences_max=info.sequences_max,
        step_tokens_max=info.step_tokens_max,
        length_max=info.length_max,
        vocab_size=info.vocab_size,
    )


def _lacking(sampling: SamplingParams, adapter: str, info: EngineInfo) -> str:
    """The first thing that a sequence needs and that the engine has not declared; or nothing."""
    if adapter and adapter not in info.adapters:
        return f"the adapter {adapter}"
    return undeclared(sampling, info.features)
