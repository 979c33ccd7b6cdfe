"""A gateway's connection to its router: the one stream, and the calls beside it.

It is used for one attachment and then thrown away, as ``router.link.Link`` is for a worker. What
goes wrong is one ``LinkDownError`` with one line that says why.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from router.errors import Fault, RequestError
from router.gateway_wire import PROTOCOL, SERVICE
from router.link import (
    EMBED_DEADLINE_S,
    MESSAGE_BYTES_MAX,
    PREPARE_DEADLINE_S,
    TOKENIZER_BYTES_MAX,
    TOKENIZER_DEADLINE_S,
    LinkDownError,
    MistrustError,
    UnreachableError,
    cause_of,
    not_connected,
)
from router.remote import Uplink
from router.v1 import gateway_pb2 as pb
from shards.v1.shard_pb2 import (
    Constraint,
    EmbedInput,
    EmbedRequest,
    EmbedResponse,
    PrepareRequest,
    PrepareResponse,
    TokenizerChunk,
)
from tls.identity import Identity
from tls.wire import NO_PROBES, channel_to

T = TypeVar("T")

ATTACH_DEADLINE_S = 10.0
GREETINGS_MAX = 3

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A connection of its own, so that a new attachment never inherits the state of a broken one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    *NO_PROBES,
    # Finds a router that vanished while nothing was asked of it, or that stands still.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_REFUSALS = {
    grpc.StatusCode.UNAUTHENTICATED: "it does not accept this key; give it with --router-api-key",
    grpc.StatusCode.UNIMPLEMENTED: "it is no router that takes gateways of this version at this "
    "port; one with --cluster-ca takes them at its --cluster-port alone",
}
_CALL_FAULTS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Fault.OVERLOADED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Fault.DEADLINE,
    grpc.StatusCode.UNIMPLEMENTED: Fault.UNSUPPORTED,
    grpc.StatusCode.INVALID_ARGUMENT: Fault.VALIDATION,
}


class RefusedError(LinkDownError):
    """The router is there, and will never take this gateway as it was started."""


class RouterLink:
    """``address`` is ``host:port`` or ``unix:///path``; ``api_key`` what the router asks for.

    ``cluster`` is by what both ends of ``host:port`` know each other; None: nothing is encrypted.
    """

    def __init__(self, address: str, api_key: str | None, cluster: Identity | None = None) -> None:
        self.address = address
        self._encrypted = cluster is not None
        self._channel = channel_to(address, cluster, _OPTIONS)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._call: grpc.aio.StreamStreamCall[pb.FromGateway, pb.ToGateway] | None = None

    async def attach(self, version: str) -> pb.Welcome:
        """Opens the stream and waits to be welcome; ``RefusedError`` says that this cannot be."""
        try:
            async with asyncio.timeout(ATTACH_DEADLINE_S):
                await self._greet(
                    pb.FromGateway(hello=pb.Hello(protocol=PROTOCOL, version=version))
                )
                message = await self._read()
        except TimeoutError:
            detail = f"it did not answer within {ATTACH_DEADLINE_S:g} s"
            raise LinkDownError(f"router {self.address}: {detail}") from None
        if not message.HasField("welcome"):
            raise LinkDownError(f"router {self.address}: it did not begin with a welcome")
        return message.welcome

    async def _greet(self, hello: pb.FromGateway) -> None:
        """Opens the stream with the first words.

        A router that refuses may end the call while it is still written to, and then grpc says
        INTERNAL in place of the router's status. So such a call is made again, to be told why.
        """
        attach = self._channel.stream_stream(
            f"/{SERVICE}/Attach",
            request_serializer=pb.FromGateway.SerializeToString,
            response_deserializer=pb.ToGateway.FromString,
        )
        for left in reversed(range(GREETINGS_MAX)):
            self._call = attach(None, metadata=self._metadata)
            try:
                await self._call.write(hello)
            except grpc.aio.AioRpcError as error:
                if not left or error.code() != grpc.StatusCode.INTERNAL:
                    self._raise_down(error)
            else:
                return

    async def write_from(self, uplink: Uplink) -> None:
        """Owner task of the sending half. Ends when the stream does; the reader knows why."""
        try:
            while True:
                await self._write(await uplink.get())
        except LinkDownError:
            return

    async def read(self) -> pb.ToGateway:
        """Waits for the next message. Raises ``LinkDownError`` at the end of the stream."""
        return await self._read()

    async def tokenizer_files(self, sha256: str) -> Mapping[str, bytes]:
        """Fetches the tokenizer files with this hash, by name."""
        ask = self._channel.unary_stream(
            f"/{SERVICE}/GetTokenizer",
            request_serializer=pb.GetTokenizerRequest.SerializeToString,
            response_deserializer=TokenizerChunk.FromString,
        )
        call = ask(
            pb.GetTokenizerRequest(sha256=sha256),
            timeout=TOKENIZER_DEADLINE_S,
            metadata=self._metadata,
        )
        files: dict[str, bytearray] = {}
        size = 0
        try:
            async for chunk in call:
                files.setdefault(chunk.name, bytearray()).extend(chunk.data)
                size += len(chunk.data)
                if size > TOKENIZER_BYTES_MAX:
                    detail = f"tokenizer files over {TOKENIZER_BYTES_MAX} bytes"
                    raise LinkDownError(f"router {self.address}: {detail}")
        except grpc.aio.AioRpcError as error:
            self._raise_down(error)
        return {name: bytes(data) for name, data in files.items()}

    async def embed(self, group: str, inputs: Sequence[Sequence[int]]) -> list[Sequence[float]]:
        """Has inputs embedded by one group. Cancelled, it cancels that.

        Raises ``RequestError`` for what is refused, ``LinkDownError`` if router or group are lost,
        and of that ``UnreachableError`` if the group gets no more requests, or never did.
        """
        wanted = EmbedRequest(inputs=[EmbedInput(tokens=tokens) for tokens in inputs])
        request = pb.GroupEmbedRequest(group=group, request=wanted)
        answer = await self._beside("Embed", request, EmbedResponse.FromString, EMBED_DEADLINE_S)
        return [one.values for one in answer.embeddings]

    async def prepare(self, group: str, constraint: Constraint) -> None:
        """Has a constraint compiled by one group; otherwise as ``embed``."""
        wanted = PrepareRequest(constraint=constraint)
        request = pb.GroupPrepareRequest(group=group, request=wanted)
        await self._beside("Prepare", request, PrepareResponse.FromString, PREPARE_DEADLINE_S)

    async def _beside(
        self, method: str, request: Message, answered: Callable[[bytes], T], timeout_s: float
    ) -> T:
        """A call that is no part of the stream."""
        ask = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answered,
        )
        try:
            answer: T = await ask(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            fault = _CALL_FAULTS.get(error.code())
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise UnreachableError(f"router {self.address}: {cause_of(error)}") from None
            if fault is None:
                self._raise_down(error)
            raise RequestError(fault, error.details() or error.code().name) from None
        except asyncio.CancelledError:
            self._raise_closed()
        return answer

    async def close(self) -> None:
        """Ends whatever is open."""
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)

    async def _write(self, message: pb.FromGateway) -> None:
        assert self._call is not None
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            self._raise_down(error)
        except asyncio.InvalidStateError:
            raise LinkDownError(f"router {self.address}: the stream has ended") from None

    async def _read(self) -> pb.ToGateway:
        assert self._call is not None
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self._raise_down(error)
        if not isinstance(message, pb.ToGateway):
            raise LinkDownError(f"router {self.address}: it ended the stream")
        return message

    def _raise_down(self, error: grpc.aio.AioRpcError) -> NoReturn:
        refusal = _REFUSALS.get(error.code())
        if refusal is not None:
            raise RefusedError(f"router {self.address}: {refusal}") from None
        if down := not_connected(self.address, error, self._encrypted):
            kind = RefusedError if isinstance(down, MistrustError) else LinkDownError
            raise kind(f"router {down}") from None
        raise LinkDownError(f"router {self.address}: {cause_of(error)}") from None

    def _raise_closed(self) -> NoReturn:
        """Tells a caller that was cancelled from one whose call was: the link was closed."""
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise asyncio.CancelledError
        raise LinkDownError(f"router {self.address}: its connection was closed") from None
