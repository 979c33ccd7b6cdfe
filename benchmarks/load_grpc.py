"""gRPC load generator: ``python -m benchmarks.load_grpc`` with a ``Job`` on stdin.

Speaks just enough HTTP/2 for server-streaming calls (RFC 9113, and the gRPC mapping in
grpc/doc/PROTOCOL-HTTP2.md) to cost a few microseconds for each message; grpcio's own client costs
as much as the server it would measure. Header compression is not decoded: an answer is good if
its last message carries ``finish``.
"""

import asyncio
from functools import partial
from time import perf_counter
from typing import cast

from benchmarks.jobs import Job, Seen
from benchmarks.tally import Tally, Trace, main
from router.v1 import router_pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 4, 5
WINDOW_MAX = (1 << 31) - 1
WINDOW_DEFAULT = 65535
FRAME_HEAD, MESSAGE_HEAD = 9, 5


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def setting(identifier: int, value: int) -> bytes:
    """One entry of a SETTINGS frame."""
    return identifier.to_bytes(2) + value.to_bytes(4)


def opening() -> bytes:
    """What a client says first. The windows are so large that they need no updates."""
    settings = (
        setting(HEADER_TABLE_SIZE, 0)
        + setting(INITIAL_WINDOW_SIZE, WINDOW_MAX)
        + setting(MAX_FRAME_SIZE, 1 << 20)
    )
    grow = (WINDOW_MAX - WINDOW_DEFAULT).to_bytes(4)
    return PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, grow)


def text(value: str) -> bytes:
    """A string of HPACK (RFC 7541, section 5.2), not Huffman-coded, shorter than 127 bytes."""
    data = value.encode()
    assert len(data) < 127
    return bytes((len(data),)) + data


def header_block(path: str, authority: str) -> bytes:
    """The request headers of a call, as HPACK literals and entries of its static table."""
    post, http = b"\x83", b"\x86"
    return b"".join(
        (
            post,
            http,
            b"\x04" + text(path),
            b"\x01" + text(authority),
            b"\x0f\x10" + text("application/grpc"),
            b"\x00" + text("te") + text("trailers"),
        )
    )


class Call:
    """One stream: counts messages, and keeps the last one."""

    __slots__ = ("ended", "last", "rest", "trace")

    def __init__(self) -> None:
        self.trace = Trace()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.rest = b""
        self.last = b""

    def data(self, payload: bytes, now_s: float) -> None:
        """Takes a DATA frame's payload: messages, each behind a flag and its length."""
        if self.rest:
            payload = self.rest + payload
        start, size = 0, len(payload)
        while start + MESSAGE_HEAD <= size:
            end = start + MESSAGE_HEAD + int.from_bytes(payload[start + 1 : start + MESSAGE_HEAD])
            if end > size:
                break
            self.last = payload[start + MESSAGE_HEAD : end]
            self.trace.events += 1
            start = end
        self.rest = payload[start:]
        if start:
            self.trace.arrivals.append(now_s)

    def end(self, fault: str = "") -> None:
        """The stream is over; an empty ``fault`` means in the regular way."""
        if not self.ended.done():
            self.ended.set_result(fault)


class Connection(asyncio.Protocol):
    """One HTTP/2 connection with any number of calls."""

    def __init__(self, headers: bytes) -> None:
        self._headers = headers
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._calls: dict[int, Call] = {}
        self._next_stream = 1
        self._window = WINDOW_DEFAULT
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(opening())

    def call(self, message: bytes) -> Call:
        """Starts a call. Raises ``RuntimeError`` when the requests are too large for the window."""
        assert self._transport is not None
        body = b"\x00" + len(message).to_bytes(4) + message
        self._window -= len(body)
        if self._window < 0:
            raise RuntimeError("the server's window is full: use fewer streams per connection")
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        call = self._calls[stream] = Call()
        self._transport.write(
            frame(HEADERS, END_HEADERS, stream, self._headers)
            + frame(DATA, END_STREAM, stream, body)
        )
        return call

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._rest:
            data = self._rest + data
        start, size, calls, now_s = 0, len(data), self._calls, perf_counter()
        while start + FRAME_HEAD <= size:
            head = int.from_bytes(data[start : start + FRAME_HEAD])
            end = start + FRAME_HEAD + (head >> 48)
            if end > size:
                break
            kind, flags, stream = head >> 40 & 0xFF, head >> 32 & 0xFF, head & 0x7FFFFFFF
            payload = data[start + FRAME_HEAD : end]
            start = end
            if kind == DATA:
                calls[stream].data(payload, now_s)
            else:
                self._control(kind, flags, stream, payload)
            if flags & END_STREAM and kind in (DATA, HEADERS):
                calls.pop(stream).end()
        self._rest = data[start:]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Any frame but DATA; response headers are not looked at."""
        assert self._transport is not None
        if kind == SETTINGS and not flags & ACK:
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload)
        elif kind == RST_STREAM:
            self._calls.pop(stream).end(f"the server reset the stream: {payload.hex()}")
        elif kind == GOAWAY:
            self._lose(f"the server goes away: {payload[8:]!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._lose(f"connection lost: {exc}")
        self._lost.set_result(None)

    def _lose(self, fault: str) -> None:
        for call in self._calls.values():
            call.end(fault)
        self._calls.clear()

    async def close(self) -> None:
        """Closes the connection; not to be used again."""
        if self._transport is not None:
            self._transport.abort()
            await self._lost


def judge(tally: Tally, call: Call, fault: str) -> None:
    """Reports one call to the tally."""
    answer = router_pb2.GenerateResponse.FromString(call.last)
    if fault or not answer.HasField("finish"):
        tally.failed(fault or f"the stream ended without finish after {call.trace.events} messages")
    else:
        tally.answered(call.trace, answer.finish.generated_tokens, answer.finish.cached_tokens)


async def client(tally: Tally, connection: Connection) -> None:
    """One of the closed loop's clients: calls until no request is left."""
    while (message := tally.next()) is not None:
        call = connection.call(message)
        judge(tally, call, await call.ended)


async def generate(job: Job) -> Seen:
    """Runs a job. The connections are open before the clock starts."""
    tally = Tally(job, [bytes.fromhex(body) for body in job.bodies])
    headers = header_block(job.path, f"{job.host}:{job.port}")
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    for _ in range(-(-job.clients // job.streams_per_connection)):
        made = await loop.create_connection(lambda: Connection(headers), job.host, job.port)
        connections.append(made[1])
    clients = [
        partial(client, tally, connections[index // job.streams_per_connection])
        for index in range(job.clients)
    ]
    seen = await tally.run(list(clients))
    for connection in connections:
        await connection.close()
    return seen


if __name__ == "__main__":
    main(generate)
