"""Sole owner of the core: its inbox, its clock, its one timer, and the doing of what it asks for.

One loop: wait for the inbox or for ``core.wake_at()``, take everything that has arrived, let the
core observe each, let it plan once, perform. Nothing here waits for a peer: a plan goes into the
slot queue of its group's links, a token is appended to the channel of its request.

Submissions are refused beyond ``requests_max`` open ones; everything else (the end of a request,
news of a group, an outcome) is bounded by the open requests and the groups, and is never refused.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, repeat
from typing import assert_never

from router import journal
from router.alarm import Alarm
from router.channel import Channel
from router.core.effects import Abandon, Close, Deliver, Effect, Left, RunPlan
from router.core.events import Ended, Event, Reason, Submitted, Ticked
from router.driven import Scheduler, Workers
from router.errors import Fault, RequestError
from router.metrics import Lifetime, Metrics
from router.tracing import CALL, NO_ANSWER, Answer

log = logging.getLogger(__name__)

WAKES_MAX = 64
"""Readers that are woken in one pass of the loop."""

STANDSTILL_MS = 1000
"""Waking so long after the core's timer was due, this process itself has stood still: it was
stopped, or its machine was."""
HEAR_S = 0.25
"""What is then heard before anybody is found late: the answers are there, and were not read."""


def monotonic_ms() -> int:
    """Milliseconds of a clock that never goes back; only differences mean anything."""
    return time.monotonic_ns() // 1_000_000


class Driver:
    """Runs the core. All methods but ``run`` and ``drain`` return at once.

    ``requests_max`` bounds the requests that are open at once; ``clock`` gives milliseconds.
    """

    def __init__(
        self,
        core: Scheduler,
        metrics: Metrics,
        requests_max: int,
        clock: Callable[[], int] = monotonic_ms,
    ) -> None:
        self.metrics = metrics
        self.requests_max = requests_max
        self._core = core
        self._clock = clock
        self._alarm = Alarm(clock, self._ring)
        self._ids = count(1)
        self._groups: dict[str, Workers] = {}
        self._channels: dict[int, Channel] = {}
        self._due: deque[Channel] = deque()
        self._waking = False
        self._inbox: list[Event] = []
        self._submissions = 0
        self._bell: asyncio.Future[None] | None = None  # while ``run`` waits
        self._fault: Exception | None = None
        self._emptied: asyncio.Future[None] | None = None
        self._refusal: str | None = None
        self._stopping = False
        self._beside = 0

    @property
    def open_requests(self) -> int:
        """Requests that have been accepted and have not ended."""
        return len(self._channels) + self._beside

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Holds a request that bypasses the core, so that a drain waits for it as for the others.

        Its own deadline ends it.
        """
        self._beside += 1
        try:
            yield
        finally:
            self._beside -= 1
            self._notice_empty()

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken at all."""
        return self._refusal is None

    def now_ms(self) -> int:
        """The core's time, for deadlines: an instant is this plus a duration."""
        return self._clock()

    def next_request_id(self) -> int:
        """A number that no request has had."""
        return next(self._ids)

    def attach(self, name: str, workers: Workers) -> None:
        """Makes a group known, before its first ``GroupUp``."""
        assert name not in self._groups
        self._groups[name] = workers

    def detach(self, name: str) -> None:
        """Forgets a group, behind its last ``GroupDown``."""
        del self._groups[name]

    def life(self, request: int) -> Lifetime | None:
        """What metrics know of an open request."""
        channel = self._channels.get(request)
        return None if channel is None else channel.life

    def submit(
        self,
        submitted: Submitted,
        channel_of: Callable[[Lifetime], Channel] = Channel,
        trace: Answer = NO_ANSWER,
    ) -> Channel:
        """Hands a request to the core. ``channel_of`` makes its channel.

        Raises ``RequestError``: OVERLOADED if too many are open, UNAVAILABLE while shutting down.
        """
        if self._refusal is not None:
            raise RequestError(Fault.UNAVAILABLE, self._refusal)
        if max(len(self._channels), self._submissions) >= self.requests_max:
            raise RequestError(
                Fault.OVERLOADED,
                f"{self.requests_max} requests are open, which is the most this server takes "
                "(max_concurrent_requests); try again later",
            )
        assert submitted.request not in self._channels
        count, model = len(submitted.prompt), submitted.model
        name = journal.NAME.get()
        now_ms, most = self._clock(), submitted.max_tokens
        life = Lifetime(count, most, now_ms, model=model, name=name, trace=trace)
        trace.submitted(submitted, now_ms)
        self.metrics.models.submitted(model)
        channel = self._channels[submitted.request] = channel_of(life)
        self._submissions += 1
        self.post(submitted)
        return channel

    def end(self, request: int, reason: Reason) -> None:
        """Ends a request on its owner's behalf. Harmless if it has ended already."""
        channel = self._channels.pop(request, None)
        if channel is not None:
            self._over(request, channel, reason, self._clock())
            self.post(Ended(request, reason))
            self._notice_empty()

    def refused(self, error: RequestError) -> None:
        """Counts and logs a request that was turned away, once, whoever tells of it again."""
        if not error.counted:
            self.metrics.refused(error)
            journal.refused(error)
            CALL.get().refused(error)

    def post(self, event: Event) -> None:
        """Puts an event into the inbox. Never refused."""
        self._inbox.append(event)
        self._ring()

    def act(self, *events: Event) -> None:
        """Posts them, and takes the turn now that would be taken in the next pass of the loop.

        For those who have read all that there was on a connection: each step begins, and each first
        token comes, so much sooner. What clients submit comes one by one, and shares a turn.
        """
        self._inbox += events
        bell, self._bell = self._bell, None
        now_ms = self._clock()
        if bell is not None and self._alarm.late_ms(now_ms) < 0 and not self._stopping:
            try:
                self._turn(now_ms, timed=False)
            except Exception as fault:  # noqa: BLE001 - it is the driver's, who ends by it
                self._fault = fault
        self._bell = bell
        if self._inbox or self._fault is not None:
            self._ring()

    async def run(self) -> None:
        """Runs until ``stop``. Whatever ends it, no reader of a channel is left waiting.

        An exception here is a fault of this program and should end the process.
        """
        detail = "the server is shutting down"
        loop = asyncio.get_running_loop()
        try:
            self._alarm.set(self._core.wake_at())
            while not self._stopping:
                await self._news(loop)
                self._bell = None
                self._raise_fault()
                now_ms = self._clock()
                late_ms = self._alarm.late_ms(now_ms)
                if not self._inbox and late_ms < 0:
                    continue  # somebody has acted on it
                if late_ms > STANDSTILL_MS:
                    log.warning("this process stood still; hearing what came meanwhile")
                    await asyncio.sleep(HEAR_S)
                    now_ms = self._clock()
                self._turn(now_ms, timed=late_ms >= 0)
        except Exception:
            detail = "the server has failed and is restarting"
            log.critical("the driver failed", exc_info=True)
            raise
        finally:
            self._bell = None
            self._alarm.stop()
            self._refusal = self._refusal or detail
            self._close_all(detail)

    def stop(self) -> None:
        """Lets ``run`` return; what is still open is closed."""
        self._refusal = self._refusal or "the server is shutting down"
        self._stopping = True
        self._ring()

    async def drain(self, limit_s: float) -> None:
        """Takes no more requests and waits for the open ones; closes those left after the limit."""
        self._refusal = self._refusal or "the server is shutting down; try another one"
        if self.open_requests:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._emptied], timeout=limit_s)
        if self.open_requests:
            text = "closing %d requests that have not ended within %g s"
            log.warning(text, self.open_requests, limit_s)
        for request in list(self._channels):
            self.post(Ended(request, Reason.SHUTDOWN))
        self._close_all(f"the server shut down before the answer was complete ({limit_s:g} s)")

    # --- the loop

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _news(self, loop: asyncio.AbstractEventLoop) -> Awaitable[None]:
        """Comes when the inbox holds something, the core's timer is due, or ``stop`` is called."""
        if self._inbox or self._stopping:
            return asyncio.sleep(0)
        self._bell = loop.create_future()
        return self._bell

    def _turn(self, now_ms: int, *, timed: bool) -> None:
        """Lets the core see everything that has arrived, plan once, and performs the lot.

        Plans go out first, for the devices wait for them; tokens and endings keep their order.
        ``timed``: the core's timer is due.
        """
        events, self._inbox, self._submissions = self._inbox, [], 0
        effects: list[Effect] = []
        for event in events:
            effects += self._core.observe(now_ms, event)
        if timed:
            effects += self._core.observe(now_ms, Ticked())
        effects += self._core.plan(now_ms)
        for effect in effects:
            if effect.__class__ is RunPlan:
                self._run_plan(effect, now_ms)
        for effect in effects:
            if effect.__class__ is not RunPlan:
                self._perform(effect, now_ms)
        if not self._waking:
            self._wake_some()
        if self._emptied is not None:
            self._notice_empty()
        self._alarm.set(self._core.wake_at())

    def _perform(self, effect: Effect, now_ms: int) -> None:
        match effect:
            case Deliver():
                began_s = time.perf_counter()
                gaps = self._deliver(effect, now_ms)
                self.metrics.delivered(time.perf_counter() - began_s, gaps)
            case Close():
                self._closed(effect, now_ms)
            case RunPlan():
                pass  # went out before all others
            case Abandon():
                if (workers := self._groups.get(effect.group)) is not None:
                    workers.abandon(effect)
            case Left():
                if (workers := self._groups.get(effect.group)) is not None:
                    workers.left(effect)
            case _:
                assert_never(effect)

    def _run_plan(self, plan: RunPlan, now_ms: int) -> None:
        self._groups[plan.group].write(plan)
        for admit in plan.admits:
            channel = self._channels.get(admit.sequence)
            if channel is None:
                continue
            life, cached = channel.life, min(admit.share_len, admit.prompt_len)
            life.trace.admitted(plan, life, now_ms, channel.last_ms)
            life.cached_tokens = max(life.cached_tokens, cached)
            if life.admitted_ms < 0:
                life.admitted_ms = now_ms
            if life.tokens and life.group != plan.group:
                self.metrics.continued(life.group, plan.group)
            life.group = plan.group

    def _deliver(self, effect: Deliver, now_ms: int) -> dict[int, int]:
        """Hands out tokens; says for each time since the one before how many had it."""
        channels = self._channels
        for request, values in effect.prompts:
            channel = channels.get(request)
            if channel is not None:
                channel.push_prompt(values)
                self._wake_later(channel)
        gaps: dict[int, int] = {}
        logprobs: Iterable[object] = effect.logprobs or repeat(None)
        for request, token, logprob in zip(effect.requests, effect.tokens, logprobs, strict=False):
            channel = channels.get(request)
            if channel is None:
                continue  # its owner has ended it, and the core will hear of it
            if channel.counted:
                if channel.last_ms < 0:
                    self.metrics.first_token(now_ms - channel.life.submitted_ms)
                    channel.life.first_ms = now_ms
                else:
                    gap_ms = now_ms - channel.last_ms
                    gaps[gap_ms] = gaps.get(gap_ms, 0) + 1
                channel.last_ms = now_ms
            channel.life.tokens += 1
            channel.push(token, logprob)
            self._wake_later(channel)
        return gaps

    def _closed(self, close: Close, now_ms: int) -> None:
        channel = self._channels.pop(close.request, None)
        if channel is not None:
            self._over(close.request, channel, close.reason, now_ms, close.detail)
            channel.close(close)
            self._wake_later(channel)

    def _over(
        self, request: int, channel: Channel, reason: Reason, now_ms: int, detail: str = ""
    ) -> None:
        """Counts and logs the end of a request."""
        if channel.counted:
            self.metrics.ended(channel.life, reason, now_ms)
            journal.ended(request, channel.life, reason, now_ms, detail)
        self.metrics.models.ended(channel.life, reason, now_ms)
        channel.life.trace.ended(request, channel.life, reason, now_ms)

    def _close_all(self, detail: str) -> None:
        now_ms = self._clock()
        for request in list(self._channels):
            self._closed(Close(request, Reason.SHUTDOWN, detail), now_ms)
        self._wake_some()
        self._notice_empty()

    # --- waking the readers

    def _wake_later(self, channel: Channel) -> None:
        if not channel.due:
            channel.due = True
            self._due.append(channel)

    def _wake_some(self) -> None:
        """Wakes the readers that have stood in line the longest, and comes back for the rest.

        Between two passes the loop hears of outcomes, so that plans do not wait until the last of
        a thousand streams has written its token; and what comes for those in line joins what they
        have, which saves them a message.
        """
        due = self._due
        for _ in range(min(WAKES_MAX, len(due))):
            channel = due.popleft()
            channel.due = False
            channel.wake()
        self._waking = bool(due)
        if due:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _notice_empty(self) -> None:
        if self._emptied is not None and not self.open_requests and not self._emptied.done():
            self._emptied.set_result(None)
