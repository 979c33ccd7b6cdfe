"""From a request's conversation to what the router's chat takes."""

from dataclasses import replace
from typing import Any

from router.api.rest.asks import invalid, model_name, openai_params, priority, unsupported
from router.api.rest.models_chat import ChatRequest, Message
from router.api.rest.openai_hints import hints_of
from router.api.rest.openai_tools import Choice, tools_of, with_tool_prompt
from router.ask import Params
from router.config import Settings
from router.conversation import ChatAsk, ToolMode
from router.fleet import Fleet, ModelCard

METADATA_MAX, KEY_MAX, VALUE_MAX = 16, 64, 512
"""OpenAI's limits of `metadata`: pairs, and characters of each part."""


def chat_ask(body: ChatRequest, settings: Settings, fleet: Fleet) -> tuple[ChatAsk, Choice]:
    """Returns a request as one ask, and what it says of tools. Raises RequestError."""
    name = model_name(body.model)
    params = chat_params(body, settings)
    choice = tools_of(body)
    if choice.mode is ToolMode.REQUIRED:
        # A format is for the text of an answer, and a forced call leaves none.
        params = replace(params, constraint=None)
    model = fleet.model(name)
    messages = messages_of(body)
    if choice.tools:
        messages = with_tool_prompt(messages, body.tool_prompt)
    ask = ChatAsk(
        messages=messages,
        params=params,
        model=model.id,
        adapter=fleet.adapter(name),
        priority=priority(body),
        tools=choice.tools,
        mode=choice.mode,
        tool=choice.tool,
        # OpenAI's older answers have room for one call.
        parallel_calls=body.parallel_tool_calls is not False and not choice.legacy,
        variables=variables_of(body, model),
        opening=body.add_generation_prompt is not False,
        continuing=_continuing(body),
        template=body.chat_template,
        reasoning=body.separate_reasoning is not False,
    )
    return ask, choice


def _continuing(body: ChatRequest) -> bool | None:
    """Whether to go on with the last message: as in vLLM if it is said, else as in TGI."""
    if body.continue_final_message and body.add_generation_prompt:
        text = "continue_final_message and add_generation_prompt exclude each other"
        raise invalid(text, "continue_final_message")
    if body.continue_final_message is None and body.add_generation_prompt is not None:
        return False
    return body.continue_final_message


def chat_params(body: ChatRequest, settings: Settings) -> Params:
    """Returns the parameters of a chat request. Raises RequestError."""
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs = true", "top_logprobs")
    if body.max_completion_tokens is not None:
        if body.max_completion_tokens < 1:
            text = f"max_completion_tokens must be at least 1, not {body.max_completion_tokens}"
            raise invalid(text, "max_completion_tokens")
        body.max_tokens = body.max_completion_tokens
    check_metadata(body.metadata or {})
    return replace(
        openai_params(body, settings),
        logprobs=bool(body.logprobs),
        top_logprobs=max(body.top_logprobs or 0, body.prompt_logprobs or 0),
    )


def check_metadata(given: dict[str, str]) -> None:
    """Checks OpenAI's `metadata`. Raises RequestError."""
    if len(given) > METADATA_MAX:
        raise invalid(f"`metadata` may have at most {METADATA_MAX} pairs", "metadata")
    if any(len(key) > KEY_MAX or len(value) > VALUE_MAX for key, value in given.items()):
        text = f"`metadata` may have keys of {KEY_MAX} and values of {VALUE_MAX} characters at most"
        raise invalid(text, "metadata")


def variables_of(body: ChatRequest, model: ModelCard) -> dict[str, Any]:
    """Returns what the client sets for the chat template. Raises RequestError."""
    given = {"documents": body.documents, "guideline": body.guideline}
    named = {name: value for name, value in given.items() if value is not None}
    return {**hints_of(body, model), **named, **(body.chat_template_kwargs or {})}


def messages_of(body: ChatRequest) -> list[dict[str, Any]]:
    """Returns the messages as the router's chat takes them. Raises RequestError."""
    return [_message(message, f"messages.{at}") for at, message in enumerate(body.messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    """The client's own fields; what only OpenAI has in the shape that all protocols share."""
    if message.audio is not None:
        raise unsupported(f"{where}.audio")
    fields = message.model_dump(exclude_none=True, exclude={"function_call", "refusal"})
    fields["content"] = _content(message)
    if message.function_call is not None:
        call = {"type": "function", "function": message.function_call.model_dump()}
        fields["tool_calls"] = [*fields.get("tool_calls", ()), call]
    # Answers have the thoughts by both names; templates know the first.
    if "reasoning" in fields:
        fields.setdefault("reasoning_content", fields["reasoning"])
    return fields


def _content(message: Message) -> str | list[dict[str, Any]]:
    """Text, or parts as they came; refusals are the assistant's words like all others."""
    if not isinstance(message.content, list):
        return message.content or message.refusal or ""
    return [
        {"type": "text", "text": part.get("refusal")} if part.get("type") == "refusal" else part
        for part in message.content
    ]
