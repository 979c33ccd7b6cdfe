"""A server of canned answers, to measure the load generators themselves.

``python -m benchmarks.fake PORT`` streams OpenAI completions over HTTP, token by token.
"""

import asyncio
import json
import sys
from contextlib import suppress

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

# Time between tokens of a stream: long enough for each to arrive alone, which is what costs most.
PACE_S = 0.005


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def token_event(text: str = " word") -> bytes:
    """An event of the size that completions have."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return event({"id": "cmpl-1", "object": "text_completion", "created": 1, "choices": [choice]})


def closing(tokens: int) -> bytes:
    """The events behind the last token."""
    usage = {"prompt_tokens": 4, "completion_tokens": tokens, "total_tokens": tokens + 4}
    return event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serves one connection until its client leaves."""
    one = chunk(token_event())
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get"):
                writer.write(OK)
                continue
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            tokens = json.loads(await reader.readexactly(length))["max_tokens"]
            writer.write(HEAD)
            for _ in range(tokens):
                writer.write(one)
                await writer.drain()
                await asyncio.sleep(PACE_S)
            writer.write(chunk(closing(tokens)) + chunk(b""))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def serve(port: int) -> None:
    """Serves until the process is ended."""
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
