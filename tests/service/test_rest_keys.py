"""Who may use which route: all that the application has are named here, or ask for the key."""

from collections.abc import Iterable, Iterator

import httpx
import pytest
from starlette.routing import Route

from router.api.rest.app import create_app
from router.config import Settings
from tests.service.fake_service import FakeFleet, FakeMetrics, FakeService
from tests.service.rest_server import client_of

KEY = "correct horse battery staple"
# These neither run the model nor tokenise; TGI leaves them open, too.
OPEN = {
    *("GET /", "GET /health", "GET /ping", "GET /info", "GET /metrics"),
    *("GET /v1/models", "GET /v1/models/{model_id:path}"),
    *("GET /docs", "GET /openapi.json", "GET /api-doc/openapi.json"),
}


def flat(routes: Iterable[object]) -> Iterator[Route]:
    """All routes; newer releases of FastAPI keep those of a router apart."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from flat(inner.routes)
            continue
        assert isinstance(route, Route), f"{route}: what it serves cannot be seen from here"
        yield route


def routes() -> Iterator[str]:
    """Method and path of every route there is, of whatever router it comes."""
    app = create_app(FakeService(), FakeFleet(), FakeMetrics(), Settings())  # type: ignore[arg-type]
    for route in flat(app.routes):
        for method in sorted((route.methods or set()) - {"HEAD"}):
            yield f"{method} {route.path}"


GUARDED = sorted(set(routes()) - OPEN)


def test_the_table_of_open_routes_is_true() -> None:
    assert set(routes()) >= OPEN


def test_what_runs_the_model_is_in_the_table() -> None:
    posts = {"/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/invocations"}
    posts |= {"/vertex", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"}
    assert {f"POST {path}" for path in posts} <= set(GUARDED)


async def ask(client: httpx.AsyncClient, route: str, header: str | None) -> httpx.Response:
    method, path = route.split(" ", 1)
    headers = {} if header is None else {"authorization": header}
    return await client.request(method, path, json={}, headers=headers)


@pytest.mark.parametrize("route", GUARDED)
async def test_a_guarded_route_answers_nobody_without_the_key(route: str) -> None:
    service = FakeService()
    async with client_of(service, Settings(api_key=KEY)) as client:
        for header in (
            *(None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY),
            *(f"Basic {KEY}", f"Bearer {KEY.upper()}"),  # TGI took a key in any case
        ):
            answer = await ask(client, route, header)
            assert answer.status_code == 401, (header, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]
        for header in (f"Bearer {KEY}", f"bearer {KEY}"):
            assert (await ask(client, route, header)).status_code != 401
        method, path = route.split(" ", 1)
        bare = await client.request(method, path, json={}, headers={"x-api-key": KEY})
        assert bare.status_code != 401  # as Anthropic's clients send it
    assert service.asks == []


@pytest.mark.parametrize("route", sorted(OPEN))
async def test_an_open_route_needs_no_key(route: str) -> None:
    async with client_of(FakeService(), Settings(api_key=KEY)) as client:
        method, path = route.split(" ", 1)
        path = path.replace("{model_id:path}", "m/one")
        assert (await client.request(method, path)).status_code == 200


async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every accepted key is compared, by hmac, whichever it is and whether or not one matched."""
    import hmac

    from router.auth import ApiKeys
    from router.errors import RequestError

    seen: list[bytes] = []
    honest = hmac.compare_digest

    def counting(given: bytes, accepted: bytes) -> bool:
        seen.append(accepted)
        return honest(given, accepted)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys = ApiKeys(["one", "two", "three"])
    keys.check("Bearer one")
    accepted = seen[:]
    assert accepted[:3] == [b"one", b"two", b"three"]
    for wrong in ("Bearer four", "Bearer ", "Basic one", "x"):
        seen.clear()
        with pytest.raises(RequestError):
            keys.check(wrong)
        assert seen == accepted
