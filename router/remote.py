"""The core of a gateway's driver: one that asks a router elsewhere.

A gateway runs the same service, driver and fleet as a router does. Its driver drives this instead
of ``router.core.scheduler.Core``: what is submitted goes out on the stream to the router, and what
comes back is performed as if it had been decided here. So the faces cannot tell where they run, and
a router that serves REST by itself serialises nothing.
"""

import asyncio
from itertools import islice
from typing import Protocol

from router.core.effects import Close, Deliver, Effect
from router.core.events import Ended, Event, Reason, Submitted, Ticked
from router.core.snapshot import Snapshot
from router.gateway_wire import (
    MESSAGE_BYTES_MAX,
    REASON_TO_WIRE,
    reason_of_wire,
    submit_to_wire,
)
from router.metrics import Lifetime
from router.v1 import gateway_pb2 as pb

BATCH_BYTES = 2**20
"""What one message to the router has of submissions, if these are not longer each by itself."""
SUBMIT_BYTES_MAX = MESSAGE_BYTES_MAX - BATCH_BYTES

LOST = "the connection to the router was lost before the answer was complete"
CLOSING = "the router is shutting down; try again in a few seconds"
UNREACHABLE = "the router cannot be reached; try again in a few seconds"


class Uplink:
    """What is to be told to the router next. One stream, one reader, which is its writer.

    Open requests bound what there can be: the end of one that has not been sent yet takes both out.
    """

    def __init__(self) -> None:
        self._submits: dict[int, tuple[pb.Submit, int]] = {}
        self._ends: dict[int, pb.End] = {}
        self._waiter: asyncio.Future[None] | None = None

    def submit(self, wire: pb.Submit, size: int) -> None:
        """A request, and its size in bytes."""
        self._submits[wire.request] = (wire, size)
        self._wake()

    def end(self, request: int, reason: Reason) -> None:
        """The end of a request on the gateway's part."""
        if self._submits.pop(request, None) is None:
            self._ends[request] = pb.End(request=request, reason=REASON_TO_WIRE[reason])
            self._wake()

    async def get(self) -> pb.FromGateway:
        """Waits until there is something to say, and returns as much of it as a message takes."""
        if not self._submits and not self._ends:
            assert self._waiter is None, "an uplink has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = pb.FromGateway(ends=self._ends.values())
        self._ends.clear()
        for request in list(islice(self._submits, self._fitting())):
            message.submits.append(self._submits.pop(request)[0])
        return message

    def _fitting(self) -> int:
        """How many submissions go into one message; at least one, if there are any."""
        total = 0
        for number, (_, size) in enumerate(self._submits.values()):
            total += size
            if number and total > BATCH_BYTES:
                return number
        return len(self._submits)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Owner(Protocol):
    """The driver, as far as this core needs it."""

    def post(self, event: Event) -> None:
        """Makes the driver ask for what is to be done."""

    def act(self, event: Event) -> None:
        """The same, at once."""

    def life(self, request: int) -> Lifetime | None:
        """What metrics know of an open request."""


class RemoteCore:
    """A ``Scheduler`` that decides nothing. The driver calls it, and the stream to the router does.

    ``owner`` must be set before anything arrives. While there is no stream, what is submitted is
    closed at once, as unavailable.
    """

    owner: Owner

    def __init__(self) -> None:
        self._uplink: Uplink | None = None
        self._refusal: str | None = UNREACHABLE
        self._arrived: list[Effect] = []
        # The requests that the router has been told of, and whether a worker has begun with each.
        self._open: dict[int, bool] = {}

    # --- for the driver

    def observe(self, now_ms: int, event: Event) -> list[Effect]:
        """Sends a submission or an end on its way."""
        match event:
            case Submitted():
                return self._submitted(event, now_ms)
            case Ended(request=request, reason=reason):
                if self._open.pop(request, None) is not None and self._uplink is not None:
                    self._uplink.end(request, reason)
        return []

    def plan(self, now_ms: int) -> list[Effect]:
        """Returns what has arrived from the router."""
        effects, self._arrived = self._arrived, []
        return effects

    def wake_at(self) -> int | None:
        """Nothing is ever due here: the router keeps the time."""
        return None

    def snapshot(self) -> Snapshot:
        """The requests that the router has; how many of them run is the router's to say."""
        return Snapshot(len(self._open), 0, (), 0, 0, 0, 0)

    def _submitted(self, event: Submitted, now_ms: int) -> list[Effect]:
        if self._uplink is None or self._refusal is not None:
            return [Close(event.request, Reason.SHUTDOWN, self._refusal or UNREACHABLE)]
        wire = submit_to_wire(event, now_ms)
        if (life := self.owner.life(event.request)) is not None:
            wire.traceparent, wire.tracestate = life.trace.context()
        size = wire.ByteSize()
        if size > SUBMIT_BYTES_MAX:
            text = f"the request takes {size} bytes; {SUBMIT_BYTES_MAX} are the most"
            return [Close(event.request, Reason.TOO_LONG, text)]
        self._open[event.request] = False
        self._uplink.submit(wire, size)
        return []

    # --- for the stream

    def attached(self) -> Uplink:
        """There is a stream now; returns what is to be written to it."""
        assert self._uplink is None, "one stream at a time"
        self._uplink, self._refusal = Uplink(), None
        return self._uplink

    def closing(self) -> None:
        """The router takes no more requests. Those that are open go on."""
        self._refusal = CLOSING

    def detached(self) -> None:
        """The stream is lost: every open request has ended."""
        self._uplink, self._refusal = None, UNREACHABLE
        for request, begun in self._open.items():
            # Where nothing has come yet, the client may try again, as with any refused request.
            close = (Reason.WORKER_LOST, LOST) if begun else (Reason.SHUTDOWN, UNREACHABLE)
            self._arrived.append(Close(request, *close))
        self._open.clear()
        self.owner.post(Ticked())

    def deliver(self, wire: pb.Delivery, now_ms: int) -> None:
        """Takes what has come of requests."""
        for start in wire.starts:
            self._begun(start, now_ms)
        prompts = [(one.request, list(one.values)) for one in wire.prompts]
        if wire.requests or prompts:
            tokens = list(wire.tokens)
            self._arrived.append(Deliver(list(wire.requests), tokens, _dense(wire), prompts))
        for close in wire.closes:
            if self._open.pop(close.request, None) is not None:
                reason = reason_of_wire(close.reason)
                self._arrived.append(Close(close.request, reason, close.detail))
        self.owner.act(Ticked())

    def _begun(self, start: pb.Start, now_ms: int) -> None:
        life = self.owner.life(start.request)
        if life is not None and start.request in self._open:
            self._open[start.request] = True
            life.cached_tokens = start.cached_tokens
            life.admitted_ms = min(now_ms, life.submitted_ms + start.queued_ms)


def _dense(wire: pb.Delivery) -> list[object]:
    """The log probabilities, parallel to the tokens; empty if no token has any."""
    if not wire.logprobs:
        return []
    dense: list[object] = [None] * len(wire.tokens)
    for place, logprob in zip(wire.logprobs_at, wire.logprobs, strict=True):
        dense[place] = logprob
    return dense
