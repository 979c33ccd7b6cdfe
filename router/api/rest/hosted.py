"""What hosts of containers call: SageMaker's ``POST /invocations``, Vertex AI's ``POST /vertex``.

Both take prompts and conversations, told apart by their fields (text-generation-inference 3.3,
router/src/sagemaker.rs and vertex.rs).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from router.api.rest import models_tgi as m
from router.api.rest.asks import invalid, model_name
from router.api.rest.body import check, ignored_header, read_json
from router.api.rest.chat import chat_params, render
from router.api.rest.collect import collect_all
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect, error_response
from router.api.rest.models_chat import ChatCompletion, ChatRequest
from router.api.rest.models_completions import Completion, CompletionRequest
from router.api.rest.native_asks import native_asks
from router.api.rest.openai import OpenAIRoutes
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.api.rest.presence import ClientLeft
from router.api.rest.refusals import refuse_unsupported
from router.api.rest.sse import known_fault
from router.api.rest.tgi import TgiRoutes
from router.api.rest.tgi_shapes import likeliest
from router.ask import Ask
from router.errors import RequestError

Handler = Callable[[Request], Awaitable[Response]]
"""A route that reads its own body."""
ERRORS = error_answers(m.ErrorResponse, 400, 401, 404, 413, 415, 422, 424, 429, 500, 503, 504)


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
            self._context.keys.check(request.headers.get("authorization"))
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
        """Answers several prompts or conversations at once."""

        async def work(body: m.VertexRequest, _: float) -> Response:
            limit = self._context.settings.max_concurrent_requests
            if not 0 < len(body.instances) <= limit:
                text = f"`instances` must have 1 to {limit} entries. Given: {len(body.instances)}"
                raise invalid(text, "instances")
            texts = await self._texts(body.instances)
            return json_response({"predictions": texts}, ignored_header(body))

        return await self._context.answer(request, m.VertexRequest, Dialect.TGI, work)

    async def _texts(self, instances: list[dict[str, Any]]) -> list[str]:
        """All answers, in order. All are understood before any runs; one failure cancels the rest.

        Raises RequestError, within an ExceptionGroup if an answer fails.
        """
        jobs = [await self._job(instance, number) for number, instance in enumerate(instances)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job.text()) for job in jobs]
        return [task.result() for task in tasks]

    async def _job(self, instance: dict[str, Any], number: int) -> "Job":
        """Understands one instance. Raises RequestError with its number."""
        try:
            return self._prompt(instance) if "inputs" in instance else await self._chat(instance)
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
        given = body.parameters or m.GenerateParameters()
        prefix = body.inputs if given.return_full_text else ""
        return Job(context, native_asks(body, context.settings, model, stream=False), prefix)

    async def _chat(self, instance: dict[str, Any]) -> "Job":
        context = self._context
        body = check(instance, ChatRequest)
        refuse_unsupported(body)
        params = chat_params(body, context.settings)
        model = context.fleet.model(model_name(body.model))
        prompt = await render(context.service, model, body)
        ask = Ask(prompt, params, model.id, add_special_tokens=False)
        return Job(context, [ask], "")


@dataclass(frozen=True, slots=True)
class Job:
    """One instance, understood; several asks are candidates for the best answer."""

    context: Context
    asks: Sequence[Ask]
    prefix: str

    async def text(self) -> str:
        """Runs it. Raises RequestError, within an ExceptionGroup if there are several asks."""
        answers = await collect_all(self.context.service, self.asks)
        return self.prefix + likeliest(answers)[0].finish.text


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
    answer = list[m.GenerateResponse] | ChatCompletion | Completion
    api.post(
        "/invocations",
        responses={200: {"model": answer, **stream_answer(m.StreamResponse)}, **ERRORS},
        openapi_extra=request_body(*bodies),
    )(routes.invocations)
    api.post(
        "/vertex",
        responses={200: {"model": m.VertexResponse}, **ERRORS},
        openapi_extra=request_body(m.VertexRequest),
    )(routes.vertex)
    return api
