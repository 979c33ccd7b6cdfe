"""What all REST routes have in common: bodies, keys, headers, documentation, clients that leave."""

import asyncio
import json

import httpx
import pytest

from router.config import Settings
from router.errors import Fault, RequestError
from tests.service.fake_service import FakeService, events_of, words
from tests.service.rest_server import client_of, post, serving


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"inputs": NaN}', 400),
        (b'{"inputs": "x", "parameters": {"temperature": Infinity}}', 400),
        (b'{"inputs": "x", "parameters": {"temperature": 1e999}}', 400),
        (b'{"inputs": "\xff"}', 400),
        (b'{"inputs": "\\ud83d"}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 400),
        (b'{"inputs": "x", "deep": ' + b"[" * 900 + b"]" * 900 + b"}", 200),
        (b"[]", 422),
        (b"null", 422),
        (b'"text"', 422),
        (b'{"inputs": ""}', 422),
        (b'{"inputs": null}', 422),
        (b'{"inputs": ["x"]}', 422),
        (b"{}", 422),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/tokenize"])
async def test_bad_bodies_are_answered(path: str, raw: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    async with client_of(FakeService()) as client:
        answer = await client.post(path, content=raw, headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert set(answer.json()) == {"error", "error_type"}


async def test_other_content_types_are_refused_and_a_missing_one_is_not() -> None:
    async with client_of(FakeService()) as client:
        raw = b'{"inputs": "x"}'
        answer = await client.post("/generate", content=raw, headers={"content-type": "text/plain"})
        assert answer.status_code == 415
        assert (await client.post("/generate", content=raw)).status_code == 200


async def test_ignored_parameters_are_named_in_a_safe_header() -> None:
    body = {"inputs": "x", "zeta": 1, "a\r\nb": 2, "parameters": {"n\0": 1, "do_sample": True}}
    for path in ("/generate", "/generate_stream"):
        answer = await post(FakeService(), path, body)
        assert answer.headers["x-ignored-parameters"] == "a__b,parameters.n_,zeta"
    many = {"inputs": "x"} | {f"{i:03}" + "y" * 200: 1 for i in range(500)}
    answer = await post(FakeService(), "/generate", many)
    assert len(answer.headers["x-ignored-parameters"]) <= 32 * 65
    assert "x-ignored-parameters" not in (await post(FakeService(), "/", {"inputs": "x"})).headers


async def test_bodies_over_the_limit_are_refused_however_they_come() -> None:
    body = json.dumps({"inputs": "x" * 1000}).encode()

    async def pieces():  # type: ignore[no-untyped-def]
        for at in range(0, len(body), 100):
            yield body[at : at + 100]

    async with client_of(FakeService(), Settings(payload_limit=500)) as client:
        for content in (body, pieces()):
            answer = await client.post("/generate", content=content)
            assert answer.status_code == 413
            assert answer.json()["error_type"] == "validation"
        lying = await client.post("/generate", content=pieces(), headers={"content-length": "9"})
        assert lying.status_code == 413
    async with client_of(FakeService(), Settings(payload_limit=len(body))) as client:
        assert (await client.post("/generate", content=body)).status_code == 200


async def test_a_large_body_can_be_sent_to_its_end_and_the_connection_used_again() -> None:
    async with (
        serving(FakeService(), Settings(payload_limit=1000)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        for _ in range(3):
            answer = await client.post("/generate", json={"inputs": "x" * 8_000_000})
            assert answer.status_code == 413
            assert (await client.post("/generate", json={"inputs": "x"})).status_code == 200


async def test_a_body_that_waits_to_be_asked_for_is_not() -> None:
    async with serving(FakeService(), Settings(payload_limit=1000)) as url, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(
            b"POST /generate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            b"content-length: 5000\r\n\r\n"
        )
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer
        writer.close()


@pytest.mark.parametrize(
    "path", ["/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/v1/completions", "/"]
)
async def test_the_key_guards_what_runs_the_model(path: str) -> None:
    async with client_of(FakeService(), Settings(api_key="Key")) as client:
        body = {
            "inputs": "x",
            "prompt": "x",
            "messages": [{"role": "user", "content": "x"}],
        }
        for value in (None, "Bearer key", "Key", "Bearer ", "Basic Key"):
            headers = {} if value is None else {"authorization": value}
            answer = await client.post(path, json=body, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        good = await client.post(path, json=body, headers={"authorization": "bearer Key"})
        assert good.status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/info")).status_code == 200


async def test_a_key_may_have_any_letters() -> None:
    async with client_of(FakeService(), Settings(api_key="schlüssel")) as client:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = await client.post("/generate", json={"inputs": "x"}, headers=headers)
            assert answer.status_code == status


async def test_what_can_be_got_can_be_asked_for_without_its_body() -> None:
    """As probes of load balancers do it, and TGI answers them."""
    async with serving(FakeService()) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/health", "/", "/ping", "/info", "/metrics", "/v1/models", "/docs"):
            got, head = await client.get(path), await client.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == got.headers["content-length"]
        assert (await client.head("/generate")).status_code == 405


async def test_unknown_paths_and_methods_are_json_errors() -> None:
    async with client_of(FakeService()) as client:
        assert (await client.get("/nowhere")).json()["error_type"] == "validation"
        assert (await client.get("/v1/nowhere")).json()["error"]["message"]
        # A redirect would name http, whatever a proxy before this speaks with its clients.
        for path in ("/generate/", "/v1/completions/"):
            assert (await client.post(path, json={})).status_code == 404
        answer = await client.delete("/generate")
        assert answer.status_code == 405
        assert answer.headers["allow"]


async def test_cors_follows_the_settings() -> None:
    origin = {"origin": "https://a.example"}
    preflight = origin | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with client_of(FakeService()) as client:
        assert (await client.options("/generate", headers=preflight)).status_code == 200
        answer = await client.get("/health", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "*"
    settings = Settings(cors_allow_origin=("https://b.example",))
    async with client_of(FakeService(), settings) as client:
        answer = await client.get("/health", headers=origin)
        assert "access-control-allow-origin" not in answer.headers


async def test_docs_need_no_other_host_and_name_every_field() -> None:
    async with client_of(FakeService()) as client:
        page = await client.get("/docs")
        assert page.status_code == 200
        assert "http" not in page.text.replace("HTTP", "")
        document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for name in ("GenerateRequest", "StreamResponse", "ChatRequest", "ErrorResponse", "Completion"):
        assert name in schemas
    undescribed = [
        (name, field)
        for name, schema in schemas.items()
        for field, about in schema.get("properties", {}).items()
        if not about.get("description") and "$ref" not in about
    ]
    assert undescribed == []
    assert "repetition_penalty" in page.text
    refs = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {ref.partition('"')[0] for ref in refs} <= schemas.keys()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_cancels_its_request(stream: bool, begun: bool) -> None:
    never = asyncio.Event()
    service = FakeService([*(words()[:2] if begun else ()), never])
    path = "/generate_stream" if stream else "/generate"
    async with serving(service) as url, asyncio.timeout(10):
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        body = b'{"inputs":"x"}'
        writer.write(
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
        )
        await service.waiting.wait()
        writer.close()
        await service.left.wait()
        assert (service.open, service.cancelled) == (0, 1)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200


async def test_a_client_that_stops_within_its_body_is_forgotten() -> None:
    service = FakeService()
    async with serving(service) as url, asyncio.timeout(10):
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/generate", json={"inputs": "x"})).status_code == 200
    assert len(service.asks) == 1


async def test_a_stream_that_waits_for_long_begins_with_a_comment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proxies give up on a server that says nothing, for a minute mostly. TGI's streams said it."""
    monkeypatch.setattr("router.api.rest.presence.KEEP_ALIVE_S", 0.01)
    gate, text = asyncio.Event(), ""
    service = FakeService([gate, RequestError(Fault.WORKER_LOST, "the worker was lost")])
    async with (
        asyncio.timeout(10),
        serving(service) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", "/generate_stream", json={"inputs": "x"}) as answer,
    ):
        assert answer.status_code == 200
        async for piece in answer.aiter_text():
            text += piece
            gate.set()
    assert text.startswith(":\n\n")
    (event,) = events_of(text)
    assert event["error_type"] == "generation"


async def test_an_idle_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.api.rest.presence.KEEP_ALIVE_S", 0.01)
    gate = asyncio.Event()
    steps = words()
    service = FakeService([steps[0], gate, *steps[1:]])
    text = ""
    async with (
        asyncio.timeout(10),
        serving(service) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", "/generate_stream", json={"inputs": "x"}) as answer,
    ):
        async for piece in answer.aiter_text():
            text += piece
            if ":\n\n" in text:
                gate.set()
    assert len(events_of(text)) == 5
