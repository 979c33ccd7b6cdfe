"""OpenAI's routes: chat completions, completions, models."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import models_openai as m
from router.api.rest import openai_shapes as shapes
from router.api.rest.asks import chat_params, completion_asks, fan_out, model_name, priority
from router.api.rest.body import ignored_header
from router.api.rest.chat import render
from router.api.rest.collect import Whole, collect_all, compute_type, timing_headers
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect, error_response
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.api.rest.refusals import refuse_unsupported
from router.api.rest.sse import EventStream, EventWriter
from router.ask import Ask, Finish
from router.errors import RequestError
from router.fleet import ModelCard

CHAT, CHAT_CHUNK = "chat.completion", "chat.completion.chunk"
COMPLETION = "text_completion"
ERRORS = error_answers(m.OpenAIError, 400, 401, 404, 413, 415, 429, 500, 503, 504)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, understood. ``asks`` has n asks for each prompt in turn."""

    body: m.SamplingFields
    model: ModelCard
    head: shapes.Head
    asks: Sequence[Ask]
    characters: int

    def usage(self, finishes: Sequence[Finish]) -> shapes.Json:
        """Returns the token counts; a prompt counts once, however many answers it has."""
        return shapes.usage(finishes, finishes[:: self.body.n or 1])


class OpenAIRoutes:
    """The handlers; each parses, asks the service and shapes the answer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._started = int(time())

    async def chat(self, request: Request) -> Response:
        """Answers a conversation, whole or as events."""
        return await self._context.answer(request, m.ChatRequest, Dialect.OPENAI, self._chat)

    async def completions(self, request: Request) -> Response:
        """Continues one or more prompts, whole or as events."""
        return await self._context.answer(
            request, m.CompletionRequest, Dialect.OPENAI, self._completions
        )

    async def _chat(self, body: m.ChatRequest, arrived: float) -> Response:
        context = self._context
        refuse_unsupported(body)
        params = chat_params(body, context.settings)
        model = context.fleet.model(model_name(body.model))
        adapter = context.fleet.adapter(model_name(body.model))
        ask = Ask(
            prompt=await render(context.service, model, body),
            params=params,
            model=model.id,
            add_special_tokens=False,
            priority=priority(body),
            adapter=adapter,
        )
        asks = fan_out(ask, body.n or 1)
        characters = sum(len(message.content or "") for message in body.messages)
        kind = CHAT_CHUNK if body.stream else CHAT
        head = shapes.Head("chatcmpl", kind, adapter or model.id)
        job = Job(body, model, head, asks, characters)
        if body.stream:
            events = [shapes.ChatEvents(job.head, i, params.logprobs) for i in range(len(asks))]
            return self._stream(job, events)
        answers = await collect_all(context.service, asks)
        choices = [
            shapes.chat_choice(index, answer, params.logprobs)
            for index, answer in enumerate(answers)
        ]
        return _whole(job, answers, choices, arrived)

    async def _completions(self, body: m.CompletionRequest, arrived: float) -> Response:
        context = self._context
        refuse_unsupported(body)
        asks = completion_asks(body, context.settings)
        model = context.fleet.model(model_name(body.model))
        adapter = context.fleet.adapter(model_name(body.model))
        echoes = [await self._echo(ask) if body.echo else "" for ask in asks]
        characters = sum(len(ask.prompt) for ask in asks[:: body.n or 1])
        head = shapes.Head("cmpl", COMPLETION, adapter or model.id)
        job = Job(body, model, head, asks, characters)
        if body.stream:
            events = [
                shapes.CompletionEvents(job.head, index, echo, body.logprobs)
                for index, echo in enumerate(echoes)
            ]
            return self._stream(job, events)
        answers = await collect_all(context.service, asks)
        choices = [
            shapes.completion_choice(index, answer, echoes[index], body.logprobs)
            for index, answer in enumerate(answers)
        ]
        return _whole(job, answers, choices, arrived)

    async def _echo(self, ask: Ask) -> str:
        if isinstance(ask.prompt, str):
            return ask.prompt
        return await self._context.service.detokenize(ask.model, ask.prompt)

    def _stream(self, job: Job, choices: Sequence[shapes.ChoiceEvents]) -> Response:
        options = job.body.stream_options

        async def produce(writer: EventWriter) -> bytes:
            finishes = await self._pump_all(job.asks, choices, writer)
            if options is None or not options.include_usage:
                return shapes.DONE
            return shapes.usage_event(job.head, job.usage(finishes)) + shapes.DONE

        headers = {
            "x-compute-type": compute_type(job.model),
            "x-compute-characters": str(job.characters),
        }
        return EventStream(produce, Dialect.OPENAI, headers | ignored_header(job.body))

    async def _pump_all(
        self, asks: Sequence[Ask], choices: Sequence[shapes.ChoiceEvents], writer: EventWriter
    ) -> list[Finish]:
        """Runs all asks at once, each writing its own events; one failure ends them all."""
        if len(asks) == 1:
            return [await self._pump(asks[0], choices[0], writer)]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._pump(ask, choice, writer))
                for ask, choice in zip(asks, choices, strict=True)
            ]
        return [task.result() for task in tasks]

    async def _pump(self, ask: Ask, choice: shapes.ChoiceEvents, writer: EventWriter) -> Finish:
        async with await self._context.service.generate(ask) as answer:
            async for chunk in answer:
                events = choice.of(chunk)
                if events:
                    await writer.write(events)
                if chunk.finish is not None:
                    return chunk.finish
        raise AssertionError("an answer ends with a finish or an error")

    def _entry(self, model: ModelCard, adapter: str = "") -> shapes.Json:
        entry = {"id": adapter or model.id, "object": "model", "created": self._started}
        parent = {"parent": model.id} if adapter else {}
        return {**entry, "owned_by": model.id, **parent}

    async def models(self) -> Response:
        """Lists the models, the default one first, and behind each its adapters."""
        data = [
            self._entry(model, name)
            for model in self._context.fleet.models()
            for name in ("", *model.adapters)
        ]
        return json_response({"object": "list", "data": data})

    async def model(self, model_id: str) -> Response:
        """Returns one model or adapter, by its name."""
        fleet = self._context.fleet
        try:
            return json_response(self._entry(fleet.model(model_id), fleet.adapter(model_id)))
        except RequestError as error:
            return error_response(_with_model_field(error), Dialect.OPENAI)


def _whole(
    job: Job, answers: Sequence[Whole], choices: Sequence[shapes.Json], arrived: float
) -> Response:
    """Returns all answers at once."""
    counts = job.usage([answer.finish for answer in answers])
    value = job.head.fields() | {"choices": choices, "usage": counts}
    headers = timing_headers(arrived, answers, job.characters, job.model)
    return json_response(value, headers | ignored_header(job.body))


def _with_model_field(error: RequestError) -> RequestError:
    """Returns the error with OpenAI's name of the parameter."""
    return RequestError(error.fault, error.message, "model")


def openai_routes(context: Context) -> APIRouter:
    """Returns the router with all of OpenAI's routes."""
    routes = OpenAIRoutes(context)
    api = APIRouter(tags=["OpenAI"])
    for path, handler, body, whole, event in (
        ("/chat/completions", routes.chat, m.ChatRequest, m.ChatCompletion, m.ChatCompletionChunk),
        ("/completions", routes.completions, m.CompletionRequest, m.Completion, m.Completion),
    ):
        answers = {200: {"model": whole, **stream_answer(event)}, **ERRORS}
        api.post(f"/v1{path}", responses=answers, openapi_extra=request_body(body))(handler)
    api.get("/v1/models", responses={200: {"model": m.ModelList}})(routes.models)
    missing = error_answers(m.OpenAIError, 404, 503)
    one = {200: {"model": m.ModelEntry}, **missing, "default": {"model": m.OpenAIError}}
    api.get("/v1/models/{model_id:path}", responses=one)(routes.model)
    return api
