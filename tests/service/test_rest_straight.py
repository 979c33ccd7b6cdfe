"""Requests that generate find their handlers without the framework; all others by it."""

import pytest
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.api.rest.straight import Straight


async def plain(request: Request) -> Response:
    return Response(f"straight, {request.scope['route'].path}")


async def with_argument(request: Request, name: str) -> Response:
    raise AssertionError((request, name))


async def framework(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("by the framework")(scope, receive, send)


def application() -> Straight:
    api = APIRouter()
    api.post("/plain")(plain)
    api.get("/read")(plain)
    api.post("/named/{name}")(with_argument)
    api.post("/query")(with_argument)
    return Straight(framework, api.routes)


async def answer(method: str, path: str) -> bytes:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    await application()(scope, receive, send)
    body: bytes = sent[-1]["body"]
    return body


async def test_a_plain_handler_is_called_with_its_route_for_traces() -> None:
    assert await answer("POST", "/plain") == b"straight, /plain"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/plain"),
        ("OPTIONS", "/plain"),
        ("POST", "/plain/"),
        ("GET", "/read"),
        ("POST", "/named/{name}"),
        ("POST", "/query"),
        ("POST", "/"),
    ],
)
async def test_all_else_is_left_to_the_framework(method: str, path: str) -> None:
    assert await answer(method, path) == b"by the framework"
