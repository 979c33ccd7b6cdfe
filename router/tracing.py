"""What is noted of requests for traces, where anybody wants them: spans by OpenTelemetry.

A call of a client is a span, below that of its caller if it names one. Each answer of the call is a
span below it, and what took the answer's time is below that. They are made when the answer has
ended, from instants that metrics keep anyway: nothing is done for a token. Without a collector
everything is told to the objects of this module, which note nothing; those that do are in
``tracing_spans``. Texts of clients and models are in no span.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

from starlette.types import Scope, Send

from router.config import ConfigError, Settings
from router.core.effects import RunPlan
from router.core.events import Reason, Submitted
from router.errors import RequestError

if TYPE_CHECKING:
    from router.ask import Embedded
    from router.metrics import Lifetime

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
"""Variables of OpenTelemetry that are read here; its library reads the others."""
PACKAGES = {
    "grpc": "opentelemetry-exporter-otlp-proto-grpc",
    "http/protobuf": "opentelemetry-exporter-otlp-proto-http",
}
"""What sends spans, by the name of the protocol."""


class Answer:
    """What is noted of one answer, from its request to its end."""

    __slots__ = ()

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to, in hexadecimal digits; empty if nobody traces it."""
        return ""

    def tokenised(self) -> None:
        """The tokens of its prompt are known."""

    def compiled(self) -> None:
        """The workers have compiled its constraint."""

    def submitted(self, request: Submitted, now_ms: int) -> None:
        """It has been accepted, by the driver's clock."""

    def admitted(self, plan: RunPlan, life: "Lifetime", now_ms: int, last_ms: int) -> None:
        """A group begins with it, or goes on with it: its latest token came at ``last_ms``."""

    def begun(self) -> None:
        """Its first token is on the way to a gateway."""

    def ended(self, request: int, life: "Lifetime", reason: Reason, now_ms: int) -> None:
        """It is over. ``request`` is the number of its sequence."""

    def context(self) -> tuple[str, str]:
        """What makes a span elsewhere one below it: W3C's ``traceparent`` and ``tracestate``."""
        return "", ""


class Call:
    """What is noted of one call of a client; a context manager around all that it causes."""

    __slots__ = ()

    @property
    def trace_id(self) -> str:
        """As that of an answer."""
        return ""

    def answer(self) -> Answer:
        """One of the answers that are asked for."""
        return NO_ANSWER

    def named(self, name: str) -> None:
        """It has a name, ``x-request-id``."""

    def chats(self) -> None:
        """It is a conversation."""

    def embedded(self, found: "Embedded") -> None:
        """It has its vectors."""

    def refused(self, error: RequestError) -> None:
        """One of its requests was turned away."""

    def sending(self, send: Send) -> Send:
        """Returns a ``send`` that hears of the status, if anybody wants to know."""
        return send

    def status(self, code: str) -> None:
        """It ends with this status of gRPC."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class Tracing:
    """Whoever is told of calls; ``on`` says whether anything becomes of it."""

    on = False

    def rest(self, scope: Scope) -> Call:
        """A request of REST."""
        return NO_CALL

    def rpc(self, method: str, metadata: Mapping[str, str | bytes]) -> Call:
        """A call of gRPC, by the full name of its method."""
        return NO_CALL

    def forwarded(self, traceparent: str, tracestate: str) -> Answer:
        """An answer that a gateway asks for, with what ``Answer.context`` said there."""
        return NO_ANSWER

    def groups_changed(self, up: Mapping[str, bool]) -> None:
        """Groups have come or gone: for each one, whether it is up now."""

    async def close(self) -> None:
        """Sends what there is to send, for a few seconds at most."""


NO_ANSWER, NO_CALL, OFF = Answer(), Call(), Tracing()
CALL: ContextVar[Call] = ContextVar("call", default=NO_CALL)
"""The call that the running task works for."""


def tracing_of(
    settings: Settings, clock_ms: Callable[[], int], *, schedules: bool = True
) -> Tracing:
    """What these settings and OpenTelemetry's own variables ask for.

    A process that schedules nothing is a gateway. Raises ``ConfigError``, as ``check``.
    """
    check(settings)
    if not _wanted(settings):
        return OFF
    from router.tracing_export import Pipeline
    from router.tracing_spans import Spans

    name = "roundhouse" if schedules else "roundhouse-gateway"
    pipeline = Pipeline(settings.otlp_endpoint, settings.otlp_service_name, name, protocol())
    return Spans(pipeline, clock_ms, schedules)


def check(settings: Settings) -> None:
    """Raises ``ConfigError``, with one line, if traces are wanted and cannot be sent."""
    if not _wanted(settings):
        return
    chosen = protocol()
    package = PACKAGES.get(chosen)
    if package is None:
        known = " or ".join(PACKAGES)
        raise ConfigError([f"{PROTOCOLS[1]} must be {known}, not {chosen[:100]!r}"])
    if not _found(package.replace("-", ".")):
        line = f"traces by {chosen} need one more package: pip install {package}"
        raise ConfigError([f"{line}; or leave otlp_endpoint out"])


def protocol() -> str:
    """What spans are sent by: gRPC, as in TGI, unless a variable of OpenTelemetry says."""
    return _first(PROTOCOLS) or "grpc"


def _wanted(settings: Settings) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if settings.otlp_endpoint:
        return True
    return bool(_first(ENDPOINTS)) and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "none"


def _first(variables: Iterable[str]) -> str:
    return next((found for name in variables if (found := os.environ.get(name))), "")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
