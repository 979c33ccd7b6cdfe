"""Server-sent events, written straight to the ASGI server: one ``send`` for each chunk.

Starlette's StreamingResponse resumes an async generator for each chunk. Here the task that makes
the answer writes it (``while_present``), and the status line goes out with the first event, so that
a request which fails before that has its proper HTTP status. One that waits for long begins with a
comment, before proxies take the silence for a server that has died.
"""

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.api.rest.errors import Dialect, error_event, error_response, first_fault
from router.api.rest.presence import ClientLeft, while_present
from router.errors import Fault, RequestError

logger = logging.getLogger(__name__)

SERVER_SEND = "roundhouse.server_send"
"""Where the application keeps the server's own ``send`` in the scope."""

KEEP_ALIVE = b":\n\n"
"""A comment, which every client skips."""
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
"""What Anthropic sends in silence, and its clients know."""


class EventWriter:
    """Writes events of one stream; the first write starts the response.

    The start goes through the application's middleware, which adds headers to it; the events go by
    ``server_send`` straight to the server, as each layer would cost every token 0.3 µs or so.

    Waits while the client reads more slowly than tokens come, which holds up this stream alone.
    Several tasks may write; an event is never torn.
    """

    def __init__(
        self, send: Send, server_send: Send, start: Message, idle: bytes = KEEP_ALIVE
    ) -> None:
        self._idle = idle
        self._send = send
        self._server_send = server_send
        self._start = start
        self.started = False
        self._writes = 0
        self._writes_seen = 0

    async def write(self, events: bytes) -> None:
        """Sends one or more complete events."""
        self._writes += 1
        if not self.started:
            self.started = True
            await self._send(self._start)
        await self._server_send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self, events: bytes = b"") -> None:
        """Sends the last events and completes the response."""
        if not self.started:
            self.started = True
            await self._send(self._start)
        await self._server_send({"type": "http.response.body", "body": events, "more_body": False})

    async def keep_alive(self) -> None:
        """Sends ``idle`` if nothing was written since the last call."""
        if self._writes == self._writes_seen:
            await self.write(self._idle)
        self._writes_seen = self._writes


Produce = Callable[[EventWriter], Coroutine[Any, Any, bytes]]
"""Writes the events of a stream and returns the last ones, which go out with the end."""


class EventStream(Response):
    """A response made of events. ``produce`` runs when the response does, not before."""

    def __init__(self, produce: Produce, dialect: Dialect, headers: Mapping[str, str]) -> None:
        merged = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(None, 200, merged, media_type="text/event-stream")
        del self.headers["content-length"]
        self._produce = produce
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the stream; a failure is an HTTP error before the first event, an event after it."""
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": self.raw_headers,
        }
        idle = PING if self._dialect is Dialect.ANTHROPIC else KEEP_ALIVE
        writer = EventWriter(send, scope.get(SERVER_SEND, send), start, idle)
        try:
            last = await while_present(receive, self._produce(writer), writer.keep_alive)
        except ClientLeft:
            return
        except Exception as error:  # noqa: BLE001 -- logged, and answered as INTERNAL
            fault = known_fault(error)
            if not writer.started:
                await error_response(fault, self._dialect, scope)(scope, receive, send)
                return
            last = error_event(fault, self._dialect, scope)
        await writer.end(last)


def known_fault(error: Exception) -> RequestError:
    """Returns the fault in an exception, or logs it and returns INTERNAL if it is a bug."""
    fault = first_fault(error)
    if fault is None:
        logger.error("request failed", exc_info=error)
        fault = RequestError(Fault.INTERNAL, "the router failed; its log says why")
    return fault
