"""A collector of OpenTelemetry: a real server of its protocol that keeps the spans it gets."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Wire
from opentelemetry.proto.trace.v1.trace_pb2 import Status

# A trace that a caller has begun, and its span: the identifiers of W3C's own example.
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KINDS = {
    Wire.SPAN_KIND_SERVER: "server",
    Wire.SPAN_KIND_CLIENT: "client",
    Wire.SPAN_KIND_INTERNAL: "internal",
}


@dataclass(frozen=True)
class Event:
    name: str
    at_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One span. ``trace``, ``id`` and ``parent`` are hexadecimal digits; no parent is empty.

    ``state`` is what W3C's ``tracestate`` says.
    """

    name: str
    kind: str
    service: str
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    failed: bool
    state: str = ""
    events: list[Event] = field(default_factory=list)

    def event(self, name: str) -> dict[str, Any]:
        (found,) = [event for event in self.events if event.name == name]
        return found.attributes


class Collector(services.TraceServiceServicer):  # type: ignore[misc]
    """``sent`` are the messages as they came. While ``held``, it answers nobody."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.sent: list[bytes] = []
        self.let = threading.Event()
        self.let.set()
        self.asked = threading.Event()

    def Export(self, request: Any, context: Any) -> Any:
        self.asked.set()
        self.let.wait(30)
        self.sent.append(request.SerializeToString())
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        return [
            _span(span, _plain(resource.resource.attributes)["service.name"])
            for message in self.sent
            for resource in pb.ExportTraceServiceRequest.FromString(message).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str, service: str = "") -> list[Span]:
        return [one for one in self.spans if one.name == name and one.service.startswith(service)]

    def one(self, name: str, service: str = "") -> Span:
        (found,) = self.named(name, service)
        return found

    def below(self, parent: Span) -> list[Span]:
        """The children of a span, in the order in which they began."""
        found = [one for one in self.spans if one.parent == parent.id]
        return sorted(found, key=lambda one: (one.start_ns, one.end_ns))

    def names(self) -> list[str]:
        return sorted(span.name for span in self.spans)


def _span(span: Wire, service: str) -> Span:
    events = [Event(one.name, one.time_unix_nano, _plain(one.attributes)) for one in span.events]
    assert all(span.start_time_unix_nano <= one.at_ns for one in events)
    return Span(
        span.name,
        KINDS[span.kind],
        service,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _plain(span.attributes),
        span.status.code == Status.STATUS_CODE_ERROR,
        span.trace_state,
        events,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    if value.HasField("array_value"):
        return [_value(one) for one in value.array_value.values]
    return getattr(value, value.WhichOneof("value"))


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector at a free port of this machine."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    services.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        collector.let.set()
        server.stop(None).wait()
