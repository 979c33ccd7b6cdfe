"""HTTP load generator: ``python -m benchmarks.load`` with a ``Job`` on stdin.

Streams over HTTP/1.1 keep-alive connections, and reads server-sent events with a scanner that does
as little as possible for each token: on a small machine the generator shares the cores with what
it measures. Understands TGI's ``/generate_stream``, OpenAI's ``/v1/completions`` and llama-server's
``/completion``.
"""

import asyncio
import json
from functools import partial
from time import perf_counter
from typing import Any, cast

from benchmarks.jobs import Job, Seen
from benchmarks.tally import Tally, Trace, main

PIECES_AT_END = 4
END_OF_HEAD = b"\r\n\r\n"
HEAD = (
    "POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\naccept: text/event-stream\r\n"
    "content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
)


class Scanner:
    """Reads one chunked response: ``feed`` bytes, then ask ``done``.

    ``events`` counts lines that start with "data:"; JSON has no raw line break, so these are the
    events. ``body`` is the text of all of them.
    """

    __slots__ = ("_head", "_held", "_length", "_rest", "body", "closing", "done", "status")

    def __init__(self) -> None:
        self._rest = b""
        self._head = True
        self._length = -1
        self._held = b""
        self.body: list[bytes] = []
        self.status = 0
        self.closing = False
        self.done = False

    def feed(self, data: bytes) -> int:
        """Takes what arrived; returns how many events started in it."""
        if self._rest:
            data = self._rest + data
        start = 0
        if self._head:
            end = data.find(END_OF_HEAD)
            if end < 0:
                self._rest = data
                return 0
            self._read_head(data[:end])
            start = end + 4
        if self._length >= 0:
            return self._plain(data[start:])
        return self._chunks(data, start)

    def _read_head(self, head: bytes) -> None:
        self._head = False
        lines = head.decode("latin-1").lower().split("\r\n")
        self.status = int(lines[0].split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        self.closing = fields.get("connection") == "close"
        if fields.get("transfer-encoding") != "chunked":
            self._length = int(fields.get("content-length", "0"))

    def _plain(self, data: bytes) -> int:
        """A body with a length: errors, mostly. Kept whole until it is there."""
        self._rest = data
        if len(data) >= self._length:
            self.body.append(data)
            self.done = True
        return 0

    def _chunks(self, data: bytes, start: int) -> int:
        events, size = 0, len(data)
        while True:
            line_end = data.find(b"\r\n", start)
            if line_end < 0:
                break
            length = int(data[start:line_end], 16)
            end = line_end + 2 + length
            if end + 2 > size:
                break
            start = end + 2
            if length == 0:
                self.done = True
                break
            events += self._piece(data[line_end + 2 : end])
        self._rest = data[start:]
        return events

    def _piece(self, piece: bytes) -> int:
        """Counts in whole lines; a piece that ends inside one waits for the next."""
        if self._held:
            piece = self._held + piece
            self._held = b""
        if not piece.endswith(b"\n"):
            self._held = piece
            return 0
        self.body.append(piece)
        return piece.startswith(b"data:") + piece.count(b"\ndata:")


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The JSON of each event, without OpenAI's closing ``[DONE]``."""
    lines = (line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def counts_of(event: dict[str, Any]) -> tuple[int, int] | None:
    """Tokens generated and prompt tokens found in a cache, if this event has the server's count."""
    if usage := event.get("usage"):
        details = usage.get("prompt_tokens_details") or {}
        return usage["completion_tokens"], details.get("cached_tokens") or 0
    if details := event.get("details"):
        return details["generated_tokens"], 0
    if event.get("stop") is True and "tokens_predicted" in event:
        return event["tokens_predicted"], event.get("tokens_cached", 0)
    return None


class Connection(asyncio.Protocol):
    """A keep-alive connection: ``ask`` sends a request and waits for the end of its stream."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._scanner = Scanner()
        self._trace = Trace()
        self._ended: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._used = False
        self._answering = False
        self._refused = False
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    async def ask(self, request: bytes) -> bool:
        """Sends one request and reads its answer to the end; the tally gets the result.

        False: the server closed a used connection before it saw the request, as HTTP/1.1 allows
        (llama-server does after every stream, unannounced); to be sent again on a new one.
        """
        assert self._transport is not None
        self._ended = asyncio.get_running_loop().create_future()
        self._scanner = Scanner()
        self._trace = Trace()
        self._answering = False
        self._transport.write(request)
        await self._ended
        if self._scanner.closing:
            await self.close()
        self._used = True
        return not self._refused

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        scanner, trace = self._scanner, self._trace
        self._answering = True
        events = scanner.feed(data)
        if events:
            trace.events += events
            trace.arrivals.append(perf_counter())
        if scanner.done and self._ended is not None:
            self._judge()
            self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        self._ended = None

    def _judge(self) -> None:
        """Reports the answer to the tally, from the events at its end."""
        scanner = self._scanner
        if scanner.status != 200:
            body = b"".join(scanner.body).decode("utf-8", "replace")
            self._tally.failed(f"status {scanner.status}: {body[:300]}")
            return
        last = events_of(b"".join(scanner.body[-PIECES_AT_END:]))
        for event in reversed(last):
            if "error" in event:
                self._tally.failed(f"error in the stream: {json.dumps(event)[:300]}")
                return
            if counts := counts_of(event):
                self._tally.answered(self._trace, *counts)
                return
        self._tally.failed(f"no token count at the end of the stream: {last[-1:]}"[:300])

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self.open = False
        self._refused = self._used and not self._answering
        if self._ended is not None and not self._refused:
            self._tally.failed(f"connection lost before the end of the answer: {exc}")
        self._end()
        self._lost.set_result(None)

    async def close(self) -> None:
        """Closes the connection; not to be used again."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()
            await self._lost


async def connect(tally: Tally) -> Connection:
    """Opens a connection to the job's server."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(tally), tally.job.host, tally.job.port
    )
    return connection


async def client(tally: Tally, connection: Connection) -> None:
    """One of the closed loop's clients: asks until no request is left."""
    try:
        while (request := tally.next()) is not None:
            if not connection.open:
                connection = await connect(tally)
            if not await connection.ask(request):
                connection = await connect(tally)
                await connection.ask(request)
            await asyncio.sleep(tally.job.think_s)
    finally:
        await connection.close()


def http_request(job: Job, body: str) -> bytes:
    """The bytes of one request."""
    data = body.encode()
    head = HEAD.format(path=job.path, host=job.host, port=job.port, length=len(data))
    return head.encode() + data


async def generate(job: Job) -> Seen:
    """Runs a job. The connections are open before the clock starts."""
    tally = Tally(job, [http_request(job, body) for body in job.bodies])
    connections = [await connect(tally) for _ in range(job.clients)]
    return await tally.run([partial(client, tally, connection) for connection in connections])


if __name__ == "__main__":
    main(generate)
