"""The load generators count what was sent, and notice what went wrong."""

import asyncio
import json
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fake, fake_grpc, load, load_grpc
from benchmarks.jobs import Job, Seen
from router.v1 import router_pb2

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def response(tokens: int, text: str = " data: x\n") -> bytes:
    events = [fake.token_event(text) for _ in range(tokens)]
    return fake.HEAD + b"".join(map(fake.chunk, [*events, fake.closing(tokens), b""]))


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(1, 12))
def test_scanner_counts_events_however_the_bytes_are_cut(cuts: list[int], tokens: int) -> None:
    data, scanner, events = response(tokens), load.Scanner(), 0
    for cut in [*cuts, len(data)]:
        assert scanner.done == (not data)
        if data:
            events += scanner.feed(data[:cut])
            data = data[cut:]
    assert scanner.done
    assert scanner.status == 200
    assert events == tokens + 2  # usage and [DONE] are events too


def test_scanner_counts_events_that_are_split_over_chunks() -> None:
    body, scanner = fake.token_event() + fake.token_event(), load.Scanner()
    cut = len(fake.token_event()) + 3
    pieces = [body[:cut], body[cut:], b""]
    assert scanner.feed(fake.HEAD + b"".join(map(fake.chunk, pieces))) == 2


def test_every_dialect_says_how_many_tokens_came() -> None:
    openai = {"usage": {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}
    assert load.counts_of(openai) == (3, 2)
    assert load.counts_of({"token": {"id": 1}, "details": {"generated_tokens": 4}}) == (4, 0)
    assert load.counts_of({"stop": True, "tokens_predicted": 5, "tokens_cached": 1}) == (5, 1)
    assert load.counts_of({"stop": False, "tokens_predicted": 5}) is None


async def run(
    handler: Handler, requests: int = 4, clients: int = 2, deadline_s: float = 20
) -> Seen:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        body = json.dumps({"max_tokens": 8})
        job = Job(port, "/v1/completions", [body] * requests, clients, 8, deadline_s=deadline_s)
        return await load.generate(job)


async def test_closed_loop_answers_every_request() -> None:
    seen = await run(fake.answer, requests=7, clients=3)
    assert (seen.tokens, seen.error_count, len(seen.first_s)) == (56, 0, 7)
    assert all(0 < first <= total for first, total in zip(seen.first_s, seen.total_s, strict=True))


def one_answer(data: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    return handler


async def test_a_refusal_is_an_error() -> None:
    seen = await run(
        one_answer(b"HTTP/1.1 429 Busy\r\nconnection: close\r\ncontent-length: 4\r\n\r\nfull")
    )
    assert (seen.error_count, seen.errors[0]) == (4, "status 429: full")


async def test_a_connection_that_closes_after_each_answer_is_opened_again() -> None:
    closing = response(8).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)
    seen = await run(one_answer(closing))
    assert (seen.error_count, seen.tokens) == (0, 32)


async def test_a_connection_that_closes_unannounced_between_answers_is_opened_again() -> None:
    seen = await run(one_answer(response(8)))
    assert (seen.error_count, seen.tokens) == (0, 32)


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    seen = await run(one_answer(response(8)[:300]))
    assert seen.error_count == 4
    assert seen.errors[0].startswith("connection lost")


async def test_an_answer_of_the_wrong_length_is_an_error() -> None:
    seen = await run(one_answer(response(7)))
    assert seen.errors[0] == "asked for 8 tokens, got 7"


async def test_a_silent_server_ends_the_run_at_the_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()

    seen = await run(silent, deadline_s=0.2)
    assert (seen.error_count, seen.tokens) == (4, 0)


async def test_grpc_generator_speaks_to_a_grpcio_server() -> None:
    server, port = await fake_grpc.start(0)
    request = router_pb2.GenerateRequest(
        text="a", parameters=router_pb2.Parameters(max_tokens=50)
    ).SerializeToString()
    path = "/router.v1.Inference/Generate"
    try:
        seen = await load_grpc.generate(Job(port, path, [request.hex()] * 20, 6, 50))
        wrong = await load_grpc.generate(Job(port, "/router.v1.Inference/No", [""], 1, 50))
    finally:
        await server.stop(None)
    assert (seen.tokens, seen.events, seen.error_count) == (1000, 1000, 0)
    assert wrong.errors == ["the stream ended without finish after 0 messages"]
