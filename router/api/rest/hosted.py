"""What hosts of containers call: SageMaker's ``POST /invocations``, Vertex AI's ``POST /vertex``.

Both take prompts and conversations, told apart by their fields (text-generation-inference 3.3,
router/src/sagemaker.rs and vertex.rs).
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from router.api.rest import models_tgi as m
from router.api.rest.asks import invalid, model_name, unsupported
from router.api.rest.body import check, ignored_header, read_json, unknown_fields
from router.api.rest.chat import chat_ask
from router.api.rest.collect import collect_all, collect_chats, together
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect, error_response
from router.api.rest.models_chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from router.api.rest.models_completions import Completion, CompletionRequest
from router.api.rest.models_openai import OpenAIError
from router.api.rest.native_asks import native_asks
from router.api.rest.openai import OpenAIRoutes
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.api.rest.presence import ClientLeft
from router.api.rest.refusals import refuse_unsupported
from router.api.rest.sse import known_fault
from router.api.rest.tgi import TgiRoutes
from router.api.rest.tgi_shapes import likeliest
from router.conversation import Call
from router.errors import RequestError

Handler = Callable[[Request], Awaitable[Response]]
"""A route that reads its own body."""
STATUSES = (400, 401, 404, 408, 413, 415, 422, 424, 429, 500, 503, 504)


class HostedRoutes:
    """The handlers. ``faces`` are routes by the field that tells their bodies, in TGI's order."""

    def __init__(self, context: Context, faces: Mapping[str, Handler]) -> None:
        self._context = context
        self._faces = faces

    async def invocations(self, request: Request) -> Response:
        """Continues a prompt (`inputs`), answers `messages`, or completes a `prompt`.

        The body goes on, as it came, to the route that it is meant for.
        """
        try:
            headers = request.headers
            self._context.keys.check(headers.get("authorization"), headers.get("x-api-key"))
            raw, value = await read_json(request, self._context.settings.payload_limit)
            handler = self._face(value)
        except ClientLeft:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 -- logged, and answered as INTERNAL
            return error_response(known_fault(error), Dialect.TGI)
        return await handler(_again(request, raw))

    def _face(self, value: Any) -> Handler:
        if isinstance(value, dict):
            for field, handler in self._faces.items():
                if field in value:
                    return handler
        raise invalid(f"body: must be an object with one of {', '.join(self._faces)}")

    async def vertex(self, request: Request) -> Response:
        """Answers several prompts or conversations at once, in order.

        All are understood before any runs; one failure cancels the rest.
        """

        async def work(body: m.VertexRequest, _: float) -> Response:
            limit = self._context.settings.max_concurrent_requests
            if not 0 < len(body.instances) <= limit:
                text = f"`instances` must have 1 to {limit} entries. Given: {len(body.instances)}"
                raise invalid(text, "instances")
            jobs = [self._job(one, number) for number, one in enumerate(body.instances)]
            ignored = [
                f"instances.{number}.{name}"
                for number, job in enumerate(jobs)
                for name in job.ignored
            ]
            texts = await together([job.run() for job in jobs])
            return json_response({"predictions": texts}, ignored_header(body, *ignored))

        return await self._context.answer(request, m.VertexRequest, Dialect.TGI, work)

    def _job(self, instance: dict[str, Any], number: int) -> "Job":
        """Understands one instance. Raises RequestError with its number."""
        try:
            return self._prompt(instance) if "inputs" in instance else self._chat(instance)
        except RequestError as error:
            where = f"instances.{number}"
            field = f"{where}.{error.field}" if error.field else where
            raise RequestError(error.fault, f"{where}: {error.message}", field) from error

    def _prompt(self, instance: dict[str, Any]) -> "Job":
        """A prompt. TGI samples on this route whether it is asked to or not; here unless told."""
        context = self._context
        body = check(instance, m.GenerateRequest)
        if body.parameters is not None and "do_sample" not in body.parameters.model_fields_set:
            body.parameters.do_sample = True
        model = context.fleet.model(model_name(body.model))
        asks = native_asks(body, context.settings, model, stream=False)
        full = body.parameters is not None and body.parameters.return_full_text

        async def work() -> str:
            answers = await collect_all(context.service, asks)
            return (body.inputs if full else "") + likeliest(answers)[0].finish.text

        return Job(work, tuple(unknown_fields(body)))

    def _chat(self, instance: dict[str, Any]) -> "Job":
        """A conversation, of whose answer there is one, and all of it at once."""
        context = self._context
        body = check(instance, ChatRequest)
        refuse_unsupported(body)
        for field, given in (("stream", body.stream), ("n", (body.n or 1) > 1)):
            if given:
                raise unsupported(field)
        ask, _ = chat_ask(body, context.settings, context.fleet)

        async def work() -> str:
            answer = (await collect_chats([partial(context.chat.chat, ask)]))[0].chat
            return answer.text or _calls_text(answer.calls)

        return Job(work, tuple(unknown_fields(body)))


@dataclass(frozen=True, slots=True)
class Job:
    """One instance: ``run`` returns the text of its answer. ``ignored`` are fields of no effect."""

    run: Callable[[], Coroutine[Any, Any, str]]
    ignored: tuple[str, ...]


def _calls_text(calls: Sequence[Call]) -> str:
    """Tool calls as JSON, for an answer that has nothing but its text; empty if there are none."""
    if not calls:
        return ""
    return orjson.dumps([{"name": one.name, "arguments": one.arguments} for one in calls]).decode()


def _again(request: Request, raw: bytes) -> Request:
    """A request like this one whose body is still to be read."""
    bodies: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Message:
        return bodies.pop() if bodies else await request.receive()

    return Request(request.scope, receive)


def hosted_routes(context: Context) -> APIRouter:
    """Returns the router with both routes."""
    native, openai = TgiRoutes(context), OpenAIRoutes(context)
    faces = {"inputs": native.compat, "messages": openai.chat, "prompt": openai.completions}
    routes = HostedRoutes(context, faces)
    api = APIRouter(tags=["Text Generation Inference"])
    bodies = (m.CompatGenerateRequest, ChatRequest, CompletionRequest)
    answer = {"model": list[m.GenerateResponse] | ChatCompletion | Completion}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": m.ErrorResponse | OpenAIError} for status in STATUSES
    }
    api.post(
        "/invocations",
        responses={
            200: {**answer, **stream_answer(m.StreamResponse, ChatCompletionChunk, Completion)},
            **errors,
        },
        openapi_extra=request_body(*bodies),
    )(routes.invocations)
    api.post(
        "/vertex",
        responses={200: {"model": m.VertexResponse}, **error_answers(m.ErrorResponse, *STATUSES)},
        openapi_extra=request_body(m.VertexRequest),
    )(routes.vertex)
    return api
