"""OpenAI's responses, without a memory: what is sent is all that is known.

Fields that are not there, and what becomes of each, are in ``models_responses.py``.
"""

from dataclasses import replace
from time import perf_counter
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import models_responses as m
from router.api.rest.asks import TIERS, invalid, model_name, openai_params, priority, unsupported
from router.api.rest.body import ignored_header
from router.api.rest.chat import check_metadata
from router.api.rest.collect import Whole, compute_type, timing_headers
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect
from router.api.rest.models_chat import ChatRequest
from router.api.rest.models_openai import OpenAIError, SamplingFields
from router.api.rest.openai_hints import hints_of
from router.api.rest.openai_tools import Choice, chosen
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.api.rest.responses_cut import cut_to_fit
from router.api.rest.responses_input import messages_of, tools_of
from router.api.rest.responses_shapes import Recorder, written
from router.api.rest.sse import EventStream, EventWriter, known_fault
from router.ask import Constraint
from router.chat import ChatGeneration
from router.conversation import ChatAsk, ToolMode
from router.errors import RequestError
from router.fleet import ModelCard
from router.text import constraints
from router.text.messages import is_shallow

LOGPROBS = "message.output_text.logprobs"
INCLUDES = frozenset(
    {
        LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
HARMLESS: dict[str, tuple[object, ...]] = {
    "access_programs": (None,),
    "background": (None, False),
    "background_options": (None,),
    "context_management": (None, []),
    "conversation": (None,),
    "image": (None,),
    "moderation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "store": (None, False),
}
"""Field to the values that ask for nothing. Any other value is refused."""
REASONING: dict[str, tuple[object, ...]] = {
    "summary": (None, "auto"),
    "generate_summary": (None, "auto"),
    "context": (None, "auto"),
    "mode": (None, "standard"),
}
SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "seed", "stop", "service_tier",
)  # fmt: skip
ECHOED = (
    "instructions", "max_output_tokens", "max_tool_calls", "prompt_cache_key", "safety_identifier",
    "user",
)  # fmt: skip
ECHO_DEPTH_MAX = 200
"""Nesting of what is repeated, under what the library can write."""
TEXT_FIELDS: Any = {"verbosity": True, "format": set(m.TextFormat.model_fields)}
NAMES = {
    "max_tokens": "max_output_tokens",
    "prompt": "input",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
"""What the rest of the router calls fields, and their names here."""
MESSAGE_NAMES = {"`max_new_tokens`": "`max_output_tokens`", "`inputs`": "`input`"}


class ResponsesRoute:
    """The handler."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def create(self, request: Request) -> Response:
        """Answers items, whole or as events."""
        return await self._context.answer(request, m.ResponsesRequest, Dialect.OPENAI, self._create)

    async def _create(self, body: m.ResponsesRequest, arrived: float) -> Response:
        _check(body)
        try:
            return await self._answer(body, arrived)
        except RequestError as error:
            raise _named_as_here(error) from None

    async def _answer(self, body: m.ResponsesRequest, arrived: float) -> Response:
        context = self._context
        model = context.fleet.model(model_name(body.model))
        choice = chosen(Choice(tools_of(body)), body.tool_choice, "tool_choice")
        ask = self._ask(body, model, choice)
        tops = None if not ask.params.logprobs else body.top_logprobs or 0
        recorder = Recorder(ask.adapter or model.id, _echo(body), tops, model.tokenizer.token_bytes)
        if body.stream:
            headers = {"x-compute-type": compute_type(model)} | ignored_header(body)
            return EventStream(_Stream(self, body, ask, recorder).run, Dialect.OPENAI, headers)
        async with await self.start(body, ask) as answer:
            submitted = perf_counter()
            async for chunk in answer:
                for _ in recorder.add(chunk):
                    pass
                if chunk.finish is not None:
                    finish = chunk.finish.finish
        timing = [Whole([], finish, submitted, perf_counter())]
        headers = timing_headers(arrived, timing, _characters(ask), model)
        return json_response(recorder.response, headers | ignored_header(body))

    def _ask(self, body: m.ResponsesRequest, model: ModelCard, choice: Choice) -> ChatAsk:
        given = SamplingFields(
            max_tokens=body.max_output_tokens, **{name: getattr(body, name) for name in SAMPLING}
        )
        logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
        params = replace(
            openai_params(given, self._context.settings),
            logprobs=logprobs,
            top_logprobs=body.top_logprobs or 0,
            # A format is for the text of an answer, and a forced call leaves none.
            constraint=None if choice.mode is ToolMode.REQUIRED else _constraint(body),
        )
        return ChatAsk(
            messages=messages_of(body),
            params=params,
            model=model.id,
            adapter=self._context.fleet.adapter(model_name(body.model)),
            priority=priority(given),
            tools=choice.tools,
            mode=choice.mode,
            tool=choice.tool,
            parallel_calls=body.parallel_tool_calls is not False,
            variables={**_hints(body, model), **(body.chat_template_kwargs or {})},
        )

    async def start(self, body: m.ResponsesRequest, ask: ChatAsk) -> ChatGeneration:
        """Submits a chat, with fewer messages if it is too long and may be cut."""
        if body.truncation == "auto":
            ask = await cut_to_fit(self._context, ask)
        return await self._context.chat.chat(ask)


class _Stream:
    """One answer as events."""

    def __init__(
        self, route: ResponsesRoute, body: m.ResponsesRequest, ask: ChatAsk, recorder: Recorder
    ) -> None:
        self._route = route
        self._body = body
        self._ask = ask
        self._recorder = recorder

    async def run(self, writer: EventWriter) -> bytes:
        """Writes all events but the last, which it returns."""
        try:
            return await self._run(writer)
        except Exception as error:  # noqa: BLE001 -- logged if it is a bug
            fault = _named_as_here(known_fault(error))
            if not writer.started:
                raise fault from None
            return written([self._recorder.fail(fault)])

    async def _run(self, writer: EventWriter) -> bytes:
        recorder, begun = self._recorder, False
        async with await self._route.start(self._body, self._ask) as answer:
            async for chunk in answer:
                events = b"" if begun else written(recorder.begin())
                begun = True
                events += written(recorder.add(chunk))
                if chunk.finish is not None:
                    return events
                if events:
                    await writer.write(events)
        raise AssertionError("an answer ends with a finish or an error")


def _check(body: m.ResponsesRequest) -> None:
    """Refuses what nothing here can honour, by name."""
    for field, harmless in HARMLESS.items():
        if getattr(body, field) not in harmless:
            stored = field in ("conversation", "previous_response_id", "prompt", "store")
            advice = (
                "nothing is stored here; send all items each time" if stored else "leave it out"
            )
            raise unsupported(field, advice)
    for name, harmless in REASONING.items():
        if getattr(body.reasoning, name, None) not in harmless:
            raise unsupported(f"reasoning.{name}")
    unknown = sorted(set(body.include or ()) - INCLUDES)
    if unknown:
        raise invalid(f"`include` has {unknown[0][:64]!r}, which is unknown", "include")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream = true", "stream_options")
    check_metadata(body.metadata or {})


def _constraint(body: m.ResponsesRequest) -> Constraint | None:
    asked = None if body.text is None else body.text.format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return constraints.json_object("text.format")
    if asked.definition is None:
        raise invalid("`text.format.schema` is needed with json_schema", "text.format.schema")
    return constraints.json_schema(asked.definition, "text.format.schema")


def _hints(body: m.ResponsesRequest, model: ModelCard) -> dict[str, Any]:
    hints = ChatRequest.model_construct(
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        verbosity=None if body.text is None else body.text.verbosity,
    )
    return hints_of(hints, model)


def _echo(body: m.ResponsesRequest) -> dict[str, Any]:
    """What of a request its answer repeats, with the defaults of what was left open.

    Raises RequestError(VALIDATION) for what cannot be written down again.
    """
    echo = _repeated(body)
    for name, value in echo.items():
        if not is_shallow(value, ECHO_DEPTH_MAX):
            raise invalid(f"`{name}` is nested too deeply", name)
    return echo


def _repeated(body: m.ResponsesRequest) -> dict[str, Any]:
    text, reasoning = {}, {"effort": None, "summary": None}
    if body.text is not None:
        text = body.text.model_dump(by_alias=True, exclude_none=True, include=TEXT_FIELDS)
    if body.reasoning is not None:
        known = set(m.ReasoningOptions.model_fields)
        reasoning |= body.reasoning.model_dump(exclude_none=True, include=known)
    tier = priority(SamplingFields(service_tier=body.service_tier))
    return {
        **{name: getattr(body, name) for name in ECHOED},
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": {"type": "text"}, **text},
        "reasoning": reasoning,
        "truncation": body.truncation or "disabled",
        "service_tier": TIERS[tier],
        "background": False,
        "store": False,
        "previous_response_id": None,
        "conversation": None,
    }


def _characters(ask: ChatAsk) -> int:
    """How much text the messages have."""
    contents = (message["content"] for message in ask.messages)
    return sum(
        len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
        for content in contents
    )


def _named_as_here(error: RequestError) -> RequestError:
    """The error, with OpenAI's names for the fields of this route."""
    for name, here in MESSAGE_NAMES.items():
        error.message = error.message.replace(name, here)
    if error.field is None:
        return error
    if error.field.startswith("tools."):
        error.message = error.message.replace(".function.", ".")
        error.field = error.field.replace(".function.", ".")
    for name, here in NAMES.items():
        if error.field == name or error.field.startswith(f"{name}."):
            error.message = error.message.replace(f"`{error.field}`", f"`{here}`")
            error.field = here
    return error


def responses_routes(context: Context) -> APIRouter:
    """Returns the router with the route."""
    route = ResponsesRoute(context)
    api = APIRouter(tags=["OpenAI"])
    errors = error_answers(OpenAIError, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
    answers = {200: {"model": m.ResponseObject, **stream_answer(m.ResponseEvent)}, **errors}
    body = request_body(m.ResponsesRequest)
    api.post("/v1/responses", responses=answers, openapi_extra=body)(route.create)
    return api
