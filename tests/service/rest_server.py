"""A real uvicorn around a fake service, as the process runs it: uvloop or asyncio, httptools."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import httpx
import uvicorn
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from router.api.rest import models_chat, models_completions
from router.api.rest.app import create_app
from router.api.rest.models_openai import OpenAIError
from router.config import Settings
from tests.service.fake_service import FakeFleet, FakeMetrics, FakeService, events_of


class Current:
    """Stands for what the running test has put there, so that tests can share one application."""

    def __init__(self) -> None:
        self.target: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@lru_cache
def _shared_app(settings: Settings) -> tuple[Any, Current, Current]:
    service, fleet = Current(), Current()
    return create_app(service, fleet, FakeMetrics(), settings), service, fleet  # type: ignore[arg-type]


def app_of(service: FakeService, settings: Settings | None = None) -> Any:
    """The application, in front of this service."""
    service.fleet = service.fleet or FakeFleet()
    app, current_service, current_fleet = _shared_app(settings or Settings())
    current_service.target, current_fleet.target = service, service.fleet
    return app


@asynccontextmanager
async def client_of(
    service: FakeService, settings: Settings | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application directly."""
    transport = httpx.ASGITransport(app_of(service, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def serving(service: FakeService, settings: Settings | None = None) -> AsyncIterator[str]:
    """Serves on a free port and yields the base URL."""
    config = uvicorn.Config(
        app_of(service, settings),
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        lifespan="off",
        http="httptools",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    sock = config.bind_socket()
    task = asyncio.create_task(server._serve([sock]))
    try:
        async with asyncio.timeout(5):
            while not server.started:
                await asyncio.sleep(0)
        host, port = sock.getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 10)
        sock.close()


USER = [{"role": "user", "content": "Hi"}]


async def post(service: FakeService, path: str, body: object, **settings: Any) -> httpx.Response:
    """Sends one request to the application directly."""
    async with client_of(service, Settings(**settings)) as client:
        return await client.post(path, json=body)


async def chat(service: FakeService, **fields: object) -> httpx.Response:
    """One chat. What comes back must be what OpenAI's SDK says it is, field by field."""
    answer = await post(service, "/v1/chat/completions", {"messages": USER, **fields})
    for value in documented(answer, models_chat.ChatCompletion, models_chat.ChatCompletionChunk):
        (ChatCompletionChunk if fields.get("stream") else ChatCompletion).model_validate(value)
    return answer


async def complete(service: FakeService, **fields: object) -> httpx.Response:
    answer = await post(service, "/v1/completions", {"prompt": "x", **fields})
    documented(answer, models_completions.Completion, models_completions.Completion)
    return answer


def documented(
    answer: httpx.Response, whole: type[BaseModel], event: type[BaseModel]
) -> list[dict[str, Any]]:
    """The answer's objects but for errors. Each has what the OpenAPI page says, no more."""
    streams = answer.headers["content-type"].startswith("text/event-stream")
    values = [v for v in events_of(answer.text) if v != "[DONE]"] if streams else [answer.json()]
    kept = []
    for value in values:
        model = OpenAIError if "error" in value else event if streams else whole
        assert model.model_validate(value).model_dump(mode="json", exclude_unset=True) == value
        if "error" not in value:
            kept.append(value)
    return kept
