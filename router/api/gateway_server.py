"""``router.v1.Gateway``: the router's side of the streams that gateway processes open.

A gateway's request is a request like any other, but that its channel leads into the outbox of the
gateway's stream. When the stream ends, in whatever way, or its reader is too slow, all requests
that came on it are ended at once.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from typing import TypeVar

from google.protobuf.message import Message
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.api.gateway_outbox import GatewayChannel, Outbox
from router.api.grpc_calls import (
    BOTH_WAYS,
    STREAM,
    UNARY,
    Context,
    Handler,
    Received,
    guarded,
    handler,
    understood,
)
from router.auth import ApiKeys
from router.config import Settings
from router.core.events import Reason, Submitted
from router.driver import Driver
from router.errors import Fault, RequestError
from router.fleet import Fleet, GroupCard
from router.gateway_wire import (
    PROTOCOL,
    REASON_OF_FAULT,
    TOKENIZER_PIECE_BYTES,
    fleet_to_wire,
    limits_to_wire,
    reason_of_wire,
    submitted_of,
)
from router.link import LinkDownError
from router.tracing import OFF, Tracing
from router.v1 import gateway_pb2 as pb
from router.validation import PRIORITY_MAX, check_vocabulary, invalid
from shards.v1.shard_pb2 import Embedding, EmbedResponse, PrepareResponse, TokenizerChunk

log = logging.getLogger(__name__)

GATEWAYS_MAX = 256
HELLO_DEADLINE_S = 10.0
WRITE_DEADLINE_S = 10.0
"""A gateway that takes so long to read one message stands still."""
WATCH_S = 2.5
"""How often it is looked at. A timer for each message would cost more than all else it takes."""

M = TypeVar("M", bound=Message)
Messages = AsyncIterator[Received[pb.FromGateway]]
TOO_SLOW = "the gateway reads too slowly: its requests were ended"


class Attached:
    """One gateway: its open requests, by its numbers for them and the driver's, and its outbox.

    ``left`` counts the requests that it had when it left.
    """

    def __init__(self, driver: Driver, fleet: Fleet, tracing: Tracing) -> None:
        self.outbox = Outbox()
        self.closing = False
        self.left = 0
        self._driver = driver
        self._fleet = fleet
        self._tracing = tracing
        self._open: dict[int, int] = {}

    @property
    def done(self) -> bool:
        """Whether the router is closing and there is nothing left to say."""
        return self.closing and not self._open and self.outbox.empty

    def hear(self, message: pb.FromGateway) -> None:
        """Takes what the gateway sent. Raises RequestError if that breaks the rules."""
        submits = message.submits
        for submit in submits:
            self._submit(submit, alone=len(submits) == 1)
        for end in message.ends:
            request = self._open.pop(end.request, None)
            if request is not None:
                self._driver.end(request, reason_of_wire(end.reason))
        self._driver.act()
        if self.closing:
            self.outbox.wake()  # that may have been the last one

    def tell_fleet(self) -> None:
        """Tells the gateway what the fleet is like now."""
        self.outbox.tell(pb.ToGateway(fleet=_told(self._fleet)))

    def close(self) -> None:
        """Takes no more requests; the stream ends after the last one."""
        self.closing = True
        self.outbox.tell(pb.ToGateway(closing=pb.Closing()))

    def leave(self) -> None:
        """Ends every open request."""
        left = list(self._open.values())
        self._open.clear()
        for request in left:
            self._driver.end(request, Reason.CANCELLED)
        self.left += len(left)

    def _submit(self, wire: pb.Submit, *, alone: bool) -> None:
        if wire.request in self._open:
            raise invalid(f"request {wire.request} was submitted twice", "submits")
        try:
            submitted = self._checked(wire, alone=alone)
            channel_of = partial(GatewayChannel, self.outbox, wire.request, self._open)
            trace = self._tracing.forwarded(wire.traceparent, wire.tracestate)
            self._driver.submit(submitted, channel_of, trace)
        except RequestError as error:
            reason = REASON_OF_FAULT.get(error.fault, Reason.ENGINE_FAILED)
            self.outbox.close(wire.request, reason, error.message)
            self.outbox.wake()
            return
        self._open[wire.request] = submitted.request

    def _checked(self, wire: pb.Submit, *, alone: bool) -> Submitted:
        """The request, if it fits the fleet as it is now: the gateway may not have heard yet.

        Raises RequestError.
        """
        card = self._fleet.model(wire.model)
        request = self._driver.next_request_id()
        submitted = submitted_of(wire, request, card.id, self._driver.now_ms(), alone=alone)
        check_vocabulary(submitted.prompt, card.vocab_size, "prompt")
        length = len(submitted.prompt) + wire.max_tokens
        if not (submitted.prompt and wire.max_tokens and length <= card.max_total_tokens):
            raise invalid(f"the model {card.id} holds {card.max_total_tokens} tokens", "prompt")
        if wire.adapter and wire.adapter not in card.adapters:
            raise invalid(f"the adapter {wire.adapter[:100]!r} is not loaded", "adapter")
        if wire.priority > PRIORITY_MAX:
            raise invalid(f"there is no priority {wire.priority}", "priority")
        return submitted


class Gateways(Collector):
    """The gateways that are attached. Serves the methods of the service."""

    def __init__(
        self, driver: Driver, fleet: Fleet, settings: Settings, tracing: Tracing = OFF
    ) -> None:
        self._driver = driver
        self._fleet = fleet
        self._settings = settings
        self._tracing = tracing
        self._keys = ApiKeys(settings.api_key)
        self._attached: list[Attached] = []
        self._calls = 0
        self._closing = False

    def handlers(self) -> dict[str, Handler]:
        """The methods of the service, by name."""
        return {
            "Attach": handler(BOTH_WAYS, self.attach, pb.FromGateway, pb.ToGateway),
            "GetTokenizer": handler(
                STREAM, self.get_tokenizer, pb.GetTokenizerRequest, TokenizerChunk
            ),
            "Embed": handler(UNARY, self.embed, pb.GroupEmbedRequest, EmbedResponse),
            "Prepare": handler(UNARY, self.prepare, pb.GroupPrepareRequest, PrepareResponse),
        }

    def collect(self) -> Iterable[Metric]:
        """Yields the gauge of gateways."""
        yield GaugeMetricFamily(
            "roundhouse_gateways", "Gateway processes attached", value=len(self._attached)
        )

    def close(self) -> None:
        """Takes no more gateways; each stream ends once its requests have ended."""
        self._closing = True
        for gateway in self._attached:
            if not gateway.closing:
                gateway.close()

    async def attach(self, messages: Messages, context: Context) -> None:
        """Serves one gateway for as long as its stream lasts."""
        async with self._call(pb.Hello(), context):
            if len(self._attached) >= GATEWAYS_MAX:
                text = f"{GATEWAYS_MAX} gateways are attached, which is the most a router takes"
                raise RequestError(Fault.OVERLOADED, text)
            hello = await _hello(messages)
            gateway = Attached(self._driver, self._fleet, self._tracing)
            log.info("gateway %s is attached, version %s", context.peer(), hello.version[:40])
            with self._known(gateway):
                await context.write(self._welcome())
                try:
                    await _serve(gateway, messages, context)
                finally:
                    gone = "gateway %s has left; %d requests ended with it"
                    log.info(gone, context.peer(), gateway.left)

    async def get_tokenizer(self, request: pb.GetTokenizerRequest | None, context: Context) -> None:
        """Streams the files of a tokenizer."""
        async with self._call(request, context) as known:
            files = self._fleet.tokenizer_files(known.sha256)
            if files is None:
                raise RequestError(Fault.MODEL_NOT_FOUND, "no group has such a tokenizer", "sha256")
            for name, data in files.items():
                for start in range(0, max(1, len(data)), TOKENIZER_PIECE_BYTES):
                    piece = data[start : start + TOKENIZER_PIECE_BYTES]
                    await context.write(TokenizerChunk(name=name, data=piece))

    async def embed(self, request: pb.GroupEmbedRequest | None, context: Context) -> EmbedResponse:
        """Has inputs embedded by one group. The call's cancellation and deadline hold."""
        async with self._call(request, context) as known:
            call = self._fleet.embed_calls(self._card(known.group).model).get(known.group)
            if call is None:
                raise _not_up(known.group)
            with self._room():
                vectors = await call([one.tokens for one in known.request.inputs])
            return EmbedResponse(embeddings=[Embedding(values=vector) for vector in vectors])
        raise AssertionError("either returned or aborted")

    async def prepare(
        self, request: pb.GroupPrepareRequest | None, context: Context
    ) -> PrepareResponse:
        """Has a constraint compiled by every rank of one group; otherwise as ``embed``."""
        async with self._call(request, context) as known:
            card = self._card(known.group)
            call = self._fleet.prepare_calls(card.model).get(card.instances)
            if call is None:
                raise _not_up(known.group)
            with self._room():
                await call(known.request.constraint)
            return PrepareResponse()
        raise AssertionError("either returned or aborted")

    def _card(self, group: str) -> GroupCard:
        """What a group last said of itself. Raises RequestError if it never has."""
        for spec, card in self._fleet.groups():
            if spec.name == group and card is not None:
                return card
        raise _not_up(group)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Bounds the calls beside the streams, of all gateways together; a drain waits for them."""
        most = self._settings.max_concurrent_requests
        if self._calls >= most:
            raise RequestError(
                Fault.OVERLOADED,
                f"{most} calls of gateways are open, which is the most that the router takes "
                "(max_concurrent_requests); try again later",
            )
        self._calls += 1
        try:
            with self._driver.beside():
                yield
        finally:
            self._calls -= 1

    def _welcome(self) -> pb.ToGateway:
        limits, fleet = limits_to_wire(self._settings), _told(self._fleet)
        return pb.ToGateway(welcome=pb.Welcome(limits=limits, fleet=fleet))

    @contextmanager
    def _known(self, gateway: Attached) -> Iterator[None]:
        """Lets the gateway hear of changes and of the end of the router."""
        self._attached.append(gateway)
        try:
            with self._fleet.watched(gateway.tell_fleet):
                yield
        finally:
            self._attached.remove(gateway)

    @asynccontextmanager
    async def _call(self, request: M | None, context: Context) -> AsyncIterator[M]:
        """Checks key and request; whatever goes wrong inside becomes the status of the call."""
        async with guarded(self._keys, request, context) as known:
            if self._closing:
                raise RequestError(Fault.UNAVAILABLE, "the router is shutting down")
            try:
                yield known
            except LinkDownError as error:
                raise RequestError(Fault.WORKER_LOST, str(error)) from None


def _told(fleet: Fleet) -> pb.Fleet:
    """The fleet as it is now, on the wire."""
    return fleet_to_wire(fleet.groups(), expecting=fleet.expecting)


def _not_up(group: str) -> RequestError:
    text = f"no group {group[:100]!r} that could is up"
    return RequestError(Fault.MODEL_NOT_FOUND, text, "group")


async def _hello(messages: Messages) -> pb.Hello:
    """The gateway's first words. Raises RequestError if they are not what is expected."""
    try:
        async with asyncio.timeout(HELLO_DEADLINE_S):
            message = understood(await anext(messages, None))
    except TimeoutError:
        raise RequestError(Fault.DEADLINE, "a gateway begins with hello, at once") from None
    if not message.HasField("hello"):
        raise invalid("a gateway begins with hello", "hello")
    hello = message.hello
    if hello.protocol != PROTOCOL:
        text = (
            f"the gateway, version {hello.version[:40]}, speaks protocol {hello.protocol} and the "
            f"router {PROTOCOL}: install the same version of both"
        )
        raise RequestError(Fault.UNSUPPORTED, text)
    return hello


async def _serve(gateway: Attached, messages: Messages, context: Context) -> None:
    """Reads and writes until one of both has ended. Raises RequestError for the gateway's faults.

    The gateway's requests are ended as soon as that has happened.
    """
    writer = _Writer(gateway, context)
    reading = asyncio.ensure_future(_read(gateway, messages))
    writing = asyncio.ensure_future(writer.run())
    watching = asyncio.ensure_future(writer.watch())
    work: list[asyncio.Future[None]] = [reading, writing, watching, gateway.outbox.overflown]
    try:
        await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        if gateway.outbox.overflown.done():
            raise RequestError(Fault.OVERLOADED, TOO_SLOW)
        for one in (reading, writing, watching):
            if one.done():
                one.result()
    finally:
        gateway.leave()
        for left in work:
            left.cancel()
        await asyncio.wait(work)


async def _read(gateway: Attached, messages: Messages) -> None:
    """Hears the gateway until it ends its half of the stream."""
    async for message in messages:
        gateway.hear(understood(message))


class _Writer:
    """Tells the gateway everything; ends with the last request of a router that closes."""

    def __init__(self, gateway: Attached, context: Context) -> None:
        self._gateway = gateway
        self._context = context
        self._since_s: float | None = None

    async def run(self) -> None:
        """Owner of the writing half."""
        while not self._gateway.done:
            await self._gateway.outbox.wait()
            for message in self._gateway.outbox.take():
                self._since_s = monotonic()
                await self._context.write(message)
                self._since_s = None

    async def watch(self) -> None:
        """Ends in RequestError, once a message is not written in time."""
        while True:
            await asyncio.sleep(WATCH_S)
            since_s = self._since_s
            if since_s is not None and monotonic() - since_s > WRITE_DEADLINE_S:
                raise RequestError(Fault.OVERLOADED, TOO_SLOW)
