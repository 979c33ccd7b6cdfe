"""Connections on which nothing comes: they must not be held for ever."""

import asyncio
import errno
import re
import socket
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

from router import faces
from router.api.rest import body
from router.connections import HEAD_BYTES_MAX
from router.faces import RestFace, listen
from tests.service.fake_service import FakeService, words
from tests.service.fakes import PATIENCE_S
from tests.service.rest_server import app_of

HALF_A_BODY = (
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b'content-length: 99\r\n\r\n{"inputs":'
)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def port(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Where REST is served as the router does it, but with little patience."""
    monkeypatch.setattr(faces, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setattr(body, "BODY_PAUSE_S", 0.1)
    face = RestFace(app_of(service), listen("127.0.0.1", 0))
    running = asyncio.create_task(face.run())
    yield face.port
    face.close()
    async with asyncio.timeout(PATIENCE_S):
        await running


async def heard(port: int, *said: bytes) -> bytes:
    """What the server says until it closes the connection on which this was said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in said:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("said", [b"", b"GET /hea", b"POST /generate HTTP/1.1\r\nhost: x\r\n"])
async def test_one_without_a_whole_request_is_closed(port: int, said: bytes) -> None:
    assert await heard(port, said) == b""


async def test_one_whose_head_comes_drop_by_drop_is_closed(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = asyncio.create_task(reader.read())
    async with asyncio.timeout(PATIENCE_S):
        for char in "GET /health HTTP/1.1\r\nx: " + "a" * 10_000:
            writer.write(char.encode())
            await asyncio.wait([said], timeout=0.03)
            if said.done():
                break
    assert await said == b""
    writer.close()


@pytest.fixture
async def patient(service: FakeService) -> AsyncIterator[int]:
    """As ``port``, with the patience of the router."""
    face = RestFace(app_of(service), listen("127.0.0.1", 0))
    running = asyncio.create_task(face.run())
    yield face.port
    face.close()
    async with asyncio.timeout(PATIENCE_S):
        await running


@pytest.mark.parametrize("head", [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\n"])
async def test_one_whose_head_is_too_large_is_told_so(patient: int, head: bytes) -> None:
    most = HEAD_BYTES_MAX
    fill = b"x: y\r\n" if head.endswith(b"\n") else b"a"
    said = (head + fill * most)[: most + 1]
    answer = await heard(patient, said[:1000], said[1000:])
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert str(most).encode() in answer


def offering(path: str, body: bytes, offer: bytes = b"h2c") -> bytes:
    """A request as Java's HttpClient sends it: it would rather speak HTTP/2."""
    head = (
        b"POST %b HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nhost: x\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n"
    )
    return head % (path.encode(), offer, len(body)) + body


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
@pytest.mark.parametrize("size", [1, 7, 50, 1 << 20])
async def test_one_who_offers_another_protocol_is_answered_in_this_one(
    patient: int, service: FakeService, size: int, offer: bytes
) -> None:
    one = offering("/generate", b'{"inputs": "first"}', offer)
    two = offering("/generate", b'{"inputs": "second"}', offer)
    bare = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    last = b"GET /nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    said = one + bare + two + last
    parts = [said[at : at + size] for at in range(0, len(said), size)]
    answer = await heard(patient, *parts)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"200", b"404"]
    assert [ask.prompt for ask in service.asks] == ["first", "second"]


async def test_a_tunnel_is_refused(patient: int) -> None:
    answer = await heard(patient, b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


async def test_large_heads_are_taken_one_after_the_other(patient: int) -> None:
    headers = {"x": "a" * (HEAD_BYTES_MAX - 500)}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{patient}") as client:
        for _ in range(5):
            assert (await client.get("/health", headers=headers)).status_code == 200


async def test_one_is_closed_that_begins_another_request_and_never_ends_it(port: int) -> None:
    answer = await heard(port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /hea")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b"HTTP/1.1") == 1


async def test_a_body_that_does_not_go_on_is_told_so(port: int, service: FakeService) -> None:
    head, _, told = (await heard(port, HALF_A_BODY)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert b"the body is not complete" in told
    assert service.asks == []


async def test_an_answer_may_take_its_time(port: int, service: FakeService) -> None:
    gate = asyncio.Event()
    service.scripts = [[gate, *words()]]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        asked = asyncio.create_task(client.post("/generate", json={"inputs": "x"}))
        await service.waiting.wait()
        for _ in range(2):  # each is given up after as long as an idle connection may live
            await heard(port)
        gate.set()
        assert (await asked).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a limit of their own")
def test_one_whose_client_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "STALLED_MS", 500)
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as connection,
    ):
        connection.settimeout(PATIENCE_S)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
            connection.sendall(b"x" * 50_000_000)
    assert caught.value.errno == errno.ETIMEDOUT
