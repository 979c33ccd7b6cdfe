"""Spans of calls, for those who want traces; see ``tracing``.

    POST /v1/chat/completions        the call, below its caller's span
      chat MODEL                     one answer; what happened to its groups are events of it
        tokenize, compile            before it was submitted
        queue, prefill, decode       in the process that schedules

A gateway's span of an answer has one of its router's below it, and that has the last three. Names
are those of OpenTelemetry's conventions for HTTP, RPC and generative models, where these have one.
"""

from collections.abc import Callable, Mapping
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Message, Scope, Send

from router.errors import WIRE, Fault, RequestError
from router.tracing import CALL, NO_CALL, Answer, Call, Tracing
from router.tracing_answers import (
    CARRIER,
    AnswerSpan,
    Attributes,
    Fall,
    Maker,
    below,
    trace_id_of,
)
from router.tracing_export import Pipeline

if TYPE_CHECKING:
    from router.ask import Embedded

CONTEXT = ("traceparent", "tracestate")
PROBES = frozenset({"ServerLive", "ServerReady", "ModelReady"})
"""Methods that ask whether somebody is there, every few seconds, as GET does over REST."""
OURS = frozenset(
    fault for fault, wire in WIRE.items() if wire.http >= 500 or wire.tgi == "generation"
)
"""Faults of this side. Others are no errors of the call, by the conventions for servers."""


class Spans(Tracing):
    """Makes a span of each call that wants something; probes are none."""

    on = True

    def __init__(self, pipeline: Pipeline, clock_ms: Callable[[], int], schedules: bool) -> None:
        self._pipeline = pipeline
        self._maker = Maker(pipeline.tracer, schedules)
        self._clock_ms = clock_ms
        self._up: Mapping[str, bool] = {}

    def rest(self, scope: Scope) -> Call:
        """A request of REST."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return NO_CALL
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        return RestCall(self._maker, _carried(headers), scope)

    def rpc(self, method: str, metadata: Mapping[str, str | bytes]) -> Call:
        """A call of gRPC."""
        if method.rpartition("/")[2] in PROBES:
            return NO_CALL
        return RpcCall(self._maker, _carried(metadata), method.lstrip("/"))

    def forwarded(self, traceparent: str, tracestate: str) -> Answer:
        """An answer that a gateway asks for."""
        carrier = {"traceparent": traceparent, "tracestate": tracestate}
        return AnswerSpan(self._maker, CARRIER.extract(carrier), SpanKind.SERVER)

    def groups_changed(self, up: Mapping[str, bool]) -> None:
        """Notes which have gone down."""
        now_ms = self._clock_ms()
        gone = [name for name, was in self._up.items() if was and not up.get(name)]
        self._maker.falls.extend(Fall(name, now_ms) for name in gone)
        self._up = dict(up)

    async def close(self) -> None:
        """Sends what there is to send, for a few seconds at most."""
        await self._pipeline.close()


def _carried(headers: Mapping[str, str | bytes]) -> dict[str, str]:
    """The context of the caller's span, if there is any."""
    found = {name: headers[name] for name in CONTEXT if name in headers}
    return {
        name: value.decode("latin-1") if isinstance(value, bytes) else value
        for name, value in found.items()
    }


class CallSpan(Call):
    """A call that is traced."""

    __slots__ = ("_failed", "_fault", "_maker", "_operation", "_span", "_token")

    def __init__(
        self, maker: Maker, carrier: Mapping[str, str], name: str, attributes: Attributes
    ) -> None:
        parent = CARRIER.extract(carrier)
        self._maker = maker
        self._span = maker.tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        self._operation = "text_completion"
        self._fault = ""
        self._failed = False
        self._token: Token[Call] | None = None

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to."""
        return trace_id_of(self._span)

    def answer(self) -> Answer:
        """One of the answers that are asked for."""
        kind = SpanKind.INTERNAL if self._maker.schedules else SpanKind.CLIENT
        return AnswerSpan(self._maker, below(self._span), kind, self._operation, self.fails)

    def named(self, name: str) -> None:
        """It has a name, ``x-request-id``."""
        self._span.set_attribute("roundhouse.request_id", name)

    def chats(self) -> None:
        """It is a conversation."""
        self._operation = "chat"

    def embedded(self, found: "Embedded") -> None:
        """It has its vectors."""
        self._span.set_attributes(
            {
                "gen_ai.operation.name": "embeddings",
                "gen_ai.provider.name": "roundhouse",
                "gen_ai.request.model": found.model,
                "gen_ai.usage.input_tokens": found.prompt_tokens,
            }
        )

    def refused(self, error: RequestError) -> None:
        """One of its requests was turned away."""
        self.fails(error.fault)

    def fails(self, fault: Fault) -> None:
        """One of its answers has ended with a fault."""
        self._fault = fault.value
        self._failed |= fault in OURS

    def __enter__(self) -> Self:
        self._token = CALL.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None:
            CALL.reset(self._token)
        self._finish()
        if self._fault:
            self._span.set_attribute("error.type", self._fault)
        if self._failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _finish(self) -> None:
        """Says how it ended, in the words of its protocol."""
        raise NotImplementedError

    def _broke(self, status: str) -> None:
        """It ended with a status that is an error of this side, whether or not anybody said why."""
        self._fault = self._fault or status
        self._failed = True


class RestCall(CallSpan):
    """A request of REST. A path without a route is the client's own word, and not told."""

    __slots__ = ("_scope", "_status")

    def __init__(self, maker: Maker, carrier: Mapping[str, str], scope: Scope) -> None:
        method = scope["method"]
        super().__init__(maker, carrier, method, {"http.request.method": method})
        self._scope = scope
        self._status = 0

    def sending(self, send: Send) -> Send:
        """Returns a ``send`` that takes note of the status. Events of streams go another way."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            await send(message)

        return noting

    def _finish(self) -> None:
        route = getattr(self._scope.get("route"), "path", "")
        if route:
            self._span.update_name(f"{self._scope['method']} {route}")
            self._span.set_attribute("http.route", route)
        if self._status:
            self._span.set_attribute("http.response.status_code", self._status)
        if self._status >= 500:
            self._broke(str(self._status))


class RpcCall(CallSpan):
    """A call of gRPC."""

    __slots__ = ("_status",)

    def __init__(self, maker: Maker, carrier: Mapping[str, str], method: str) -> None:
        names: Attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        super().__init__(maker, carrier, method, names)
        self._status = "CANCELLED"  # unless it comes to an end of its own

    def status(self, code: str) -> None:
        """It ends with this status."""
        self._status = code

    def _finish(self) -> None:
        self._span.set_attribute("rpc.response.status_code", self._status)
        if self._status in ("INTERNAL", "UNKNOWN"):
            self._broke(self._status)
