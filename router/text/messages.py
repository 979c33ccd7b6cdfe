"""Conversations as a chat template is given them: checked, and in the shape that it can read."""

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from router.errors import Fault, RequestError
from router.text.template import ChatTemplate
from router.text.tools.formats import MISTRAL_ID_CHARS, ToolFormat
from router.text.tools.telling import joined, plain_messages, text_of, with_calls_as_text

DEPTH_MAX = 64
"""Nesting of what a client hands to the template, well under what ``tojson`` can recurse into."""
UNSEEN_CHARS = 2048
"""What lists of parts and tools are taken to weigh."""

_ALPHANUMERIC = string.digits + string.ascii_letters
_SHORT_ID = re.compile(rf"[a-zA-Z0-9]{{{MISTRAL_ID_CHARS}}}")
Message = Mapping[str, Any]


def laid_open(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checks messages in OpenAI's shape, and brings them into that of templates.

    ``developer`` is ``system``, ``function`` is ``tool``, no content is an empty text, arguments
    that are JSON text become what they say, and a result has the name of its function if the call
    is there.

    Raises RequestError, VALIDATION or UNSUPPORTED, with a field such as ``messages.3.content``.
    """
    if not messages:
        raise _invalid("`messages` cannot be empty", "messages")
    names: dict[str, str] = {}
    return [_message(message, f"messages.{at}", names) for at, message in enumerate(messages)]


def for_template(
    messages: Sequence[Message], template: ChatTemplate | None, form: ToolFormat, *, native: bool
) -> list[Message]:
    """What the template can read of messages that ``laid_open`` returned.

    Lists of parts are joined unless it takes them, system messages go into the user's first one
    if they would be refused or left out, and are one if no second one would be taken, arguments are
    JSON text again if it wants that, ids are as long as Mistral's where only those are taken, and
    calls are made one by one by models that do so. Calls that the template would leave out are
    text. Without ``native`` the template has no words for tools: calls and results become text.
    """
    out: Sequence[Message] = messages
    if template is None or not template.takes_parts:
        out = [{**message, "content": text_of(message["content"])} for message in out]
    if template is not None and not template.takes_system:
        out = _without_system(out)
    elif template is not None and not template.takes_systems:
        out = _with_one_system(out)
    if not native:
        return plain_messages(out)
    if template is not None and not template.takes_calls:
        return [with_calls_as_text(message, form) for message in out]
    out = out if form.several else _one_by_one(out)
    as_text = template is not None and not template.takes_arguments
    return [_called(message, as_text=as_text, short=form.short_ids) for message in out]


def _leading(messages: Sequence[Message]) -> list[Message]:
    """The system's messages before all others."""
    return list(takewhile(lambda one: one["role"] == "system", messages))


def _without_system(messages: Sequence[Message]) -> Sequence[Message]:
    leading = _leading(messages)
    others = messages[len(leading) :]
    if not leading or not others or others[0]["role"] != "user":
        return messages
    contents = [message["content"] for message in (*leading, others[0])]
    return [{**others[0], "content": joined(contents)}, *others[1:]]


def _with_one_system(messages: Sequence[Message]) -> Sequence[Message]:
    leading = _leading(messages)
    if len(leading) < 2:
        return messages
    text = joined(message["content"] for message in leading)
    return [{**leading[0], "content": text}, *messages[len(leading) :]]


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Calls of one turn as turns of their own, each with its result behind it."""
    out: list[Message] = []
    waiting: list[Message] = list(messages)
    while waiting:
        message = waiting.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            out.append(message)
            continue
        results = list(takewhile(lambda one: one["role"] == "tool", waiting))
        del waiting[: len(results)]
        for number, call in enumerate(calls):
            content = {} if number == 0 else {"content": ""}
            out.append({**message, "tool_calls": [call], **content})
            own = [one for one in results if one.get("tool_call_id") == call.get("id")]
            out += own
            results = [one for one in results if one not in own]
        out += results
    return out


def speaks_of_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation has calls or results of tools."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def weight(messages: Sequence[Message], variables: Mapping[str, Any]) -> int:
    """About how many characters there are to lay out; a lot where that is not seen at once."""
    texts = (message.get("content") for message in messages)
    size = sum(len(text) if isinstance(text, str) else UNSEEN_CHARS for text in texts)
    return size + 64 * len(messages) + (UNSEEN_CHARS if variables.get("tools") else 0)


def is_shallow(value: Any, depth: int = DEPTH_MAX) -> bool:
    """Whether a JSON value is nested at most ``depth`` deep."""
    if not isinstance(value, Mapping | list | tuple):
        return True
    if depth == 0:
        return False
    parts = value.values() if isinstance(value, Mapping) else value
    return all(is_shallow(part, depth - 1) for part in parts)


def _message(message: Message, where: str, names: dict[str, str]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise _invalid(f"`{where}.role` must be a text", f"{where}.role")
    if not is_shallow(message):
        raise _invalid(f"`{where}` is nested more than {DEPTH_MAX} levels deep", where)
    role = {"developer": "system", "function": "tool"}.get(role, role)
    content = _content(message.get("content"), f"{where}.content")
    out = {**message, "role": role, "content": content}
    if message.get("tool_calls"):
        out["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls", names)
    else:
        out.pop("tool_calls", None)  # templates ask whether it is there, not what is in it
    call = message.get("tool_call_id")
    if role == "tool" and not message.get("name") and isinstance(call, str) and call in names:
        out["name"] = names[call]
    return out


def _content(content: Any, where: str) -> Any:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid(f"`{where}` must be a text or a list of parts", where)
    return [_part(part, f"{where}.{at}") for at, part in enumerate(content)]


def _part(part: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(part, Mapping):
        raise _invalid(f"`{where}` must be an object", where)
    kind = part.get("type")
    if kind != "text":
        name = str(kind)[:32]
        text = f"`{where}`: parts of type {name!r} are not supported, only 'text'"
        raise RequestError(Fault.UNSUPPORTED, text, where)
    if not isinstance(part.get("text"), str):
        raise _invalid(f"`{where}.text` must be a string", f"{where}.text")
    return part


def _calls(calls: Any, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise _invalid(f"`{where}` must be a list", where)
    return [_call(call, f"{where}.{at}", names) for at, call in enumerate(calls)]


def _call(call: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _invalid(f"`{where}` must have a `function` with a `name`", f"{where}.function")
    name, given = function["name"], function.get("arguments")
    if isinstance(call.get("id"), str):
        names[call["id"]] = name
    arguments = _arguments(given, f"{where}.function.arguments")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _arguments(given: Any, where: str) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError):
            raise _invalid(f"`{where}` is not JSON", where) from None
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not is_shallow(given):
        raise _invalid(f"`{where}` must be a JSON object, at most {DEPTH_MAX} levels deep", where)
    return given


def _called(message: Message, *, as_text: bool, short: bool) -> Message:
    changed: dict[str, Any] = {}
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            _shown(call, as_text=as_text, short=short) for call in message["tool_calls"]
        ]
    if short and isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    return {**message, **changed} if changed else message


def _shown(call: Mapping[str, Any], *, as_text: bool, short: bool) -> Mapping[str, Any]:
    out = dict(call)
    if as_text:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        out["function"] = {**call["function"], "arguments": text}
    if short and isinstance(call.get("id"), str):
        out["id"] = _short_id(call["id"])
    return out


def _short_id(given: str) -> str:
    """An id that Mistral's templates take: the given one, or always the same one made of it."""
    if _SHORT_ID.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.sha256(given.encode(errors="replace")).digest())
    digits = []
    for _ in range(MISTRAL_ID_CHARS):
        number, digit = divmod(number, len(_ALPHANUMERIC))
        digits.append(_ALPHANUMERIC[digit])
    return "".join(digits)


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Fault.VALIDATION, message, field)
