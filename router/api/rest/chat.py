"""From a conversation to a prompt."""

from typing import Any

from router.api.rest.asks import invalid
from router.api.rest.models_openai import ChatRequest, Message
from router.errors import Fault, RequestError
from router.fleet import ModelCard
from router.service import Service

RESERVED = frozenset({"self", "model", "messages", "add_generation_prompt", "tools"})
DEPTH_MAX = 64
"""Nesting of chat_template_kwargs, well under what a template's `tojson` can recurse into."""


async def render(service: Service, model: ModelCard, body: ChatRequest) -> str:
    """Returns the prompt that the model's chat template makes of a request. Raises RequestError."""
    messages = [_message(message, number) for number, message in enumerate(body.messages)]
    variables = body.chat_template_kwargs or {}
    reserved = sorted(RESERVED & variables.keys())
    if reserved:
        raise invalid(f"chat_template_kwargs cannot set {reserved[0]}", "chat_template_kwargs")
    if not _shallow(variables, DEPTH_MAX):
        text = f"chat_template_kwargs may be nested {DEPTH_MAX} deep at most"
        raise invalid(text, "chat_template_kwargs")
    going_on = bool(body.continue_final_message)
    opening = body.add_generation_prompt
    if going_on and opening:
        text = "continue_final_message and add_generation_prompt exclude each other"
        raise invalid(text, "continue_final_message")
    opening = not going_on if opening is None else opening
    text = await service.render_chat(model, messages, add_generation_prompt=opening, **variables)
    return _cut_behind(text, messages[-1]) if going_on else text


def _message(message: Message, number: int) -> dict[str, Any]:
    """Returns what the template sees: the client's fields, content as one string."""
    fields = dict(message.model_extra or {})
    if not _shallow(fields, DEPTH_MAX):
        raise invalid(f"messages.{number} is nested too deeply", f"messages.{number}")
    role = "system" if message.role == "developer" else message.role
    return {**fields, "role": role, "content": _content(message.content, number)}


def _content(content: str | list[dict[str, Any]] | None, number: int) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = []
    for at, part in enumerate(content):
        where = f"messages.{number}.content.{at}"
        kind = part.get("type")
        if kind != "text":
            name = str(kind)[:32]
            text = f"`{where}`: parts of type {name!r} are not supported, only 'text'"
            raise RequestError(Fault.UNSUPPORTED, text, where)
        if not isinstance(part.get("text"), str):
            raise invalid(f"`{where}.text` must be a string", f"{where}.text")
        texts.append(part["text"])
    return "".join(texts)


def _cut_behind(text: str, last: dict[str, Any]) -> str:
    """Returns a rendered conversation up to the end of its last message's content."""
    content = last["content"].strip()
    at = text.rfind(content) if content else -1
    if at < 0:
        message = "the chat template does not show the last message, so it cannot be continued"
        raise RequestError(Fault.TEMPLATE, message, "continue_final_message")
    return text[: at + len(content)]


def _shallow(value: Any, depth: int) -> bool:
    """Tells whether a JSON value is nested at most ``depth`` deep."""
    if not isinstance(value, dict | list):
        return True
    if depth == 0:
        return False
    parts = value.values() if isinstance(value, dict) else value
    return all(_shallow(part, depth - 1) for part in parts)
