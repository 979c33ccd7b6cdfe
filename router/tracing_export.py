"""How spans leave: in batches, from a thread of the library, that nothing here waits for.

What may wait is bounded (``OTEL_BSP_MAX_QUEUE_SIZE``); what does not fit is dropped. A collector
that cannot be reached costs a line of the log a minute.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

from opentelemetry.sdk.resources import (
    HOST_NAME,
    PROCESS_PID,
    SERVICE_NAME,
    SERVICE_VERSION,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from router.api.rest.tgi import version
from router.config import ConfigError

log = logging.getLogger(__name__)

FLUSH_S = 3.0
"""What is left at the end may take so long to be sent."""
STOP_S = 1.0
LINE_EVERY_S = 60.0
HTTP_PATH = "/v1/traces"


class Pipeline:
    """The way of spans to the collector. ``tracer`` makes them.

    ``endpoint`` None is what OpenTelemetry's variables say. ``service`` is what this process is
    called where neither ``name`` nor these say. Raises ``ConfigError`` if they do not fit.
    """

    def __init__(self, endpoint: str | None, name: str | None, service: str, protocol: str) -> None:
        _tame()
        try:
            self._exporter = _exporter(endpoint, protocol)
            self._processor = BatchSpanProcessor(self._exporter)
            resource = _resource(name, service)
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        except Exception as error:
            # The library's own words about a variable that it cannot read.
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError([f"traces cannot be sent: {cause[:200]}"]) from error
        self._provider.add_span_processor(self._processor)
        self.tracer = self._provider.get_tracer("roundhouse", version())

    async def close(self) -> None:
        """Sends what is left, for ``FLUSH_S`` at most, and ends the thread."""
        if not await _within(FLUSH_S, self._processor.force_flush):
            # It would go on to try, and the thread wait for it.
            await _within(STOP_S, self._exporter.shutdown)
        await _within(STOP_S, self._provider.shutdown)


def _exporter(endpoint: str | None, protocol: str) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    if endpoint is not None and not endpoint.endswith(HTTP_PATH):
        endpoint = endpoint.rstrip("/") + HTTP_PATH
    return trace_exporter.OTLPSpanExporter(endpoint)


def _resource(name: str | None, service: str) -> Resource:
    """Who this process is, by the option, else by OpenTelemetry's variables."""
    attributes = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not (name or os.environ.get("OTEL_SERVICE_NAME") or f"{SERVICE_NAME}=" in attributes):
        name = service
    own: dict[str, str | int] = {
        SERVICE_VERSION: version(),
        HOST_NAME: socket.gethostname(),
        PROCESS_PID: os.getpid(),
    }
    return Resource(own).merge(Resource.create({SERVICE_NAME: name} if name else {}))


class _Lines(logging.Handler):
    """Says what the library logs in lines of this program, one in ``LINE_EVERY_S``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Passes it on, if it is time."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + LINE_EVERY_S
            log.warning("traces: %s", record.getMessage().split("\n", 1)[0])


_LINES = _Lines()


def _tame() -> None:
    """The library logs each attempt, with tracebacks."""
    theirs = logging.getLogger("opentelemetry")
    theirs.propagate = False
    theirs.addHandler(_LINES)


async def _within(limit_s: float, work: Callable[[], object]) -> bool:
    """Waits for work in a thread of its own, which is left alone when its time is over.

    Returns whether it was done in time.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done.set)

    Thread(target=run, name="traces", daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await done.wait()
    return done.is_set()
