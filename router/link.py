"""One rank of a group: its connection, and the one stream of plans and outcomes on it.

    dialled ──describe──► known ──open──► streaming ──any failure──► down (for good)

A link is used for one life of its group and then thrown away; there is no way back to an earlier
state, so a rank never has two streams from here. What goes wrong is one ``LinkDownError``
with one line that says why.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from router.core.effects import RunPlan
from router.errors import Fault, RequestError
from router.handshakes import is_closed, mismatch
from shards.v1.shard_pb2 import (
    Constraint,
    DescribeRequest,
    DescribeResponse,
    EmbedInput,
    EmbedRequest,
    EmbedResponse,
    GetTokenizerRequest,
    Outcome,
    Plan,
    PrepareRequest,
    PrepareResponse,
    Sampling,
    TokenizerChunk,
)
from tls.identity import Identity
from tls.wire import NO_PROBES, channel_to

T = TypeVar("T")

DESCRIBE_DEADLINE_S = 5.0
OPEN_DEADLINE_S = 10.0
TOKENIZER_DEADLINE_S = 120.0
EMBED_DEADLINE_S = 300.0
PREPARE_DEADLINE_S = 60.0
TOKENIZER_BYTES_MAX = 256 * 2**20
MESSAGE_BYTES_MAX = 64 * 2**20
"""A plan may admit many long prompts at once: 64 of 128,000 tokens take 25 MB."""

UNREACHABLE = "failed to connect"
"""What grpc says in such a case; the code is the same as that of a lost connection."""
_NUMBER = re.compile(r" \(\d+\)$")  # of the error, behind its name

_CALL_FAULTS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Fault.OVERLOADED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Fault.DEADLINE,
    grpc.StatusCode.UNIMPLEMENTED: Fault.UNSUPPORTED,
    grpc.StatusCode.INVALID_ARGUMENT: Fault.VALIDATION,
}
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A connection of its own, so that a new life never inherits the state of a broken one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    *NO_PROBES,
)
_KEEPALIVE: tuple[tuple[str, int], ...] = (
    # Finds a host that vanished while nothing was asked of it. The worker allows such pings.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class LinkDownError(Exception):
    """A rank cannot be used any longer; the text is one line that says why."""


class UnreachableError(LinkDownError):
    """Nobody is there who could answer."""


class MistrustError(LinkDownError):
    """Somebody is there who does not speak TLS, or whose certificate is not to be believed."""


class ClosedError(UnreachableError):
    """Somebody is there, and closes the connection before anything is said."""


class SilentError(LinkDownError):
    """Somebody is there, and has not answered in time."""


class Backoff:
    """Pauses between attempts: each longer than the last, up to a limit, and never quite equal.

    The jitter of a fifth keeps many routers from asking a returning worker at the same instant.
    """

    def __init__(
        self, random: Random, first_s: float = 0.05, most_s: float = 2.0, factor: float = 1.6
    ) -> None:
        self._random = random
        self._first_s = first_s
        self._most_s = most_s
        self._factor = factor
        self._next_s = first_s

    def pause_s(self) -> float:
        """How long to wait now, in seconds."""
        pause = self._next_s
        self._next_s = min(self._most_s, pause * self._factor)
        return pause * self._random.uniform(0.8, 1.2)

    def reset(self) -> None:
        """Something worked: start short again."""
        self._next_s = self._first_s


def encode(plan: RunPlan) -> bytes:
    """The plan as ``shards.v1.Plan`` on the wire; the same bytes go to every rank."""
    wire = Plan(
        epoch=plan.epoch,
        plan_id=plan.plan_id,
        drops=plan.drops,
        work_sequences=plan.work_sequences,
        work_tokens=plan.work_tokens,
    )
    for admit in plan.admits:
        message = wire.admits.add(
            sequence=admit.sequence,
            tokens=admit.tokens,
            prompt_len=admit.prompt_len,
            share_from=admit.share_from,
            share_len=admit.share_len,
            adapter=admit.adapter,
        )
        if admit.sampling is not None:
            message.sampling.CopyFrom(cast(Sampling, admit.sampling))
    return wire.SerializeToString()


class Link:
    """``address`` is ``unix:///path`` or ``host:port``; ``slots`` bounds unwritten plans.

    ``cluster`` is by what both ends of ``host:port`` know each other; None: nothing is encrypted.
    """

    def __init__(self, address: str, slots: int, cluster: Identity | None = None) -> None:
        self.address = address
        self._encrypted = cluster is not None
        options = _OPTIONS if address.startswith("unix:") else _OPTIONS + _KEEPALIVE
        self._channel = channel_to(address, cluster, options)
        self._slots = slots
        self._plans: deque[bytes] = deque()
        self._more: asyncio.Future[None] | None = None
        self._call: grpc.aio.StreamStreamCall[bytes, Outcome] | None = None

    async def describe(self) -> DescribeResponse:
        """Asks once what the worker is. A worker that is still loading does not answer."""
        ask = self._channel.unary_unary(
            "/shards.v1.Shard/Describe",
            request_serializer=DescribeRequest.SerializeToString,
            response_deserializer=DescribeResponse.FromString,
        )
        try:
            answer: DescribeResponse = await ask(DescribeRequest(), timeout=DESCRIBE_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise self._down(error) from None
        return answer

    async def tokenizer_files(self) -> Mapping[str, bytes]:
        """Fetches the model's tokenizer files, by name."""
        ask = self._channel.unary_stream(
            "/shards.v1.Shard/GetTokenizer",
            request_serializer=GetTokenizerRequest.SerializeToString,
            response_deserializer=TokenizerChunk.FromString,
        )
        files: dict[str, bytearray] = {}
        size = 0
        try:
            async for chunk in ask(GetTokenizerRequest(), timeout=TOKENIZER_DEADLINE_S):
                files.setdefault(chunk.name, bytearray()).extend(chunk.data)
                size += len(chunk.data)
                if size > TOKENIZER_BYTES_MAX:
                    raise LinkDownError(
                        f"{self.address}: tokenizer files over {TOKENIZER_BYTES_MAX} bytes"
                    )
        except grpc.aio.AioRpcError as error:
            raise self._down(error) from None
        return {name: bytes(data) for name, data in files.items()}

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[Sequence[float]]:
        """Has inputs turned into vectors, beside the stream of plans. Cancelled, it cancels that.

        Raises ``RequestError`` for what the worker refuses, ``LinkDownError`` if it is lost.
        """
        request = EmbedRequest(inputs=[EmbedInput(tokens=tokens) for tokens in inputs])
        answer = await self._beside("Embed", request, EmbedResponse.FromString, EMBED_DEADLINE_S)
        return [one.values for one in answer.embeddings]

    async def prepare(self, constraint: Constraint) -> None:
        """Has a constraint compiled and kept by the worker; otherwise as ``embed``."""
        request = PrepareRequest(constraint=constraint)
        await self._beside("Prepare", request, PrepareResponse.FromString, PREPARE_DEADLINE_S)

    async def _beside(
        self, method: str, request: Message, answered: Callable[[bytes], T], timeout_s: float
    ) -> T:
        """A call that is no part of the log of plans."""
        ask = self._channel.unary_unary(
            f"/shards.v1.Shard/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answered,
        )
        try:
            answer: T = await ask(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            fault = _CALL_FAULTS.get(error.code())
            if fault is None:
                raise self._down(error) from None
            raise RequestError(fault, error.details() or error.code().name) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not the caller was cancelled, but the call: this link was closed under it.
            raise LinkDownError(f"{self.address}: its connection was closed") from None
        return answer

    async def open(self) -> None:
        """Opens the stream of plans and waits until the worker has emptied its engine for it."""
        assert self._call is None, "one stream for each rank"
        run = self._channel.stream_stream(
            "/shards.v1.Shard/Run",
            request_serializer=None,
            response_deserializer=Outcome.FromString,
        )
        self._call = run(None)
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                await self._call.initial_metadata()
        except TimeoutError:
            detail = f"its engine was not ready for a new stream within {OPEN_DEADLINE_S:g} s"
            raise SilentError(f"{self.address}: {detail}") from None

    def write(self, plan: bytes) -> None:
        """Puts an encoded plan into the queue of the writer. Never waits.

        The core keeps no more plans in flight than there are slots, so there is always one.
        """
        assert len(self._plans) < self._slots, "more plans than there are slots"
        self._plans.append(plan)
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    async def write_plans(self) -> None:
        """Owner task of the sending half. Ends when the stream does; the reader knows why."""
        assert self._call is not None
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self._plans:
                    await self._call.write(self._plans.popleft())
                self._more = loop.create_future()
                await self._more
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return

    async def read_outcomes(self, answered: Callable[[Outcome], None]) -> None:
        """Owner task of the receiving half: passes on outcomes. Ends in ``LinkDownError``."""
        assert self._call is not None
        try:
            while isinstance(outcome := await self._call.read(), Outcome):
                answered(outcome)
        except grpc.aio.AioRpcError as error:
            raise self._down(error) from None
        raise LinkDownError(f"{self.address}: the worker ended the stream")

    async def close(self) -> None:
        """Ends whatever is open."""
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)

    def _down(self, error: grpc.aio.AioRpcError) -> LinkDownError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return SilentError(f"{self.address}: no answer in time; it may be loading its model")
        return not_connected(self.address, error, self._encrypted) or LinkDownError(
            f"{self.address}: {cause_of(error)}"
        )


def not_connected(
    address: str, error: grpc.aio.AioRpcError, encrypted: bool
) -> LinkDownError | None:
    """Why nothing could be said over a connection; None if that was not the reason.

    ``encrypted``: this end speaks TLS, unless the address is that of a unix socket.
    """
    if not is_unreachable(error):
        return None
    found = mismatch(error.details() or "", encrypted=encrypted)
    if found is None or address.startswith("unix:"):
        return UnreachableError(f"{address}: {cause_of(error)}")
    kind = MistrustError if found.certain else ClosedError
    return kind(f"{address}: {found.text}")


def is_unreachable(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call failed because nobody listens at the address."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and UNREACHABLE in (error.details() or "")


def cause_of(error: grpc.aio.AioRpcError) -> str:
    """Why a call failed, in a line. Of a failure to connect grpc tells more than anyone reads."""
    lines = (error.details() or "no details").splitlines()
    details = "".join(filter(str.isprintable, lines[0] if lines else ""))
    if is_unreachable(error):
        return f"nobody can be reached there ({_NUMBER.sub('', details.rpartition(': ')[2])})"
    if error.code() is grpc.StatusCode.UNAVAILABLE and is_closed(details):
        return f"the connection broke: its process has ended, or the network fails ({details})"
    return f"{error.code().name}: {details}"


def one_line(failures: Iterable[BaseException]) -> str:
    """The causes of several failures, each once, in a line."""
    return "; ".join(dict.fromkeys(str(failure) for failure in failures))
