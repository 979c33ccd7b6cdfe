"""From the items of OpenAI's responses to the messages of a chat."""

import json
from collections.abc import Sequence
from typing import Any

from router.api.rest.asks import invalid, unsupported
from router.api.rest.models_responses import ResponsesRequest
from router.api.rest.openai_tools import NO_PARAMETERS
from router.conversation import Tool

Json = dict[str, Any]

_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the field that has it."""
_ROLES = ("user", "assistant", "system", "developer")
_TOOL_FIELDS = ("name", "description", "parameters", "strict")


def messages_of(body: ResponsesRequest) -> list[Json]:
    """Returns the conversation that the instructions and the input are. Raises RequestError."""
    if isinstance(body.input, str):
        messages: list[Json] = [{"role": "user", "content": body.input}]
    else:
        messages = _Conversation().of(body.input)
    if not messages:
        raise invalid("`input` cannot be empty", "input")
    return _instructed(messages, body.instructions) if body.instructions else messages


def _instructed(messages: list[Json], instructions: str) -> list[Json]:
    """The conversation with instructions; one system message, as templates take no second one."""
    first, *others = messages
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": instructions}, *messages]
    given = first["content"]
    text = given if isinstance(given, str) else "".join(part["text"] for part in given)
    return [{**first, "content": f"{instructions}\n\n{text}"}, *others]


class _Conversation:
    """Puts together what is one message in a chat and several items here.

    That is an assistant's turn: thoughts, then text, then calls, each there or not.
    """

    def __init__(self) -> None:
        self._messages: list[Json] = []
        self._turn: Json | None = None

    def of(self, items: Sequence[Json]) -> list[Json]:
        """The messages of all items."""
        for number, item in enumerate(items):
            self._add(item, f"input.{number}")
        self._end_turn()
        return self._messages

    def _add(self, item: Json, where: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else None)
        match kind:
            case "message":
                self._message(item, where)
            case "function_call":
                call = _call(item, where)
                self._speaking().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                self._end_turn()
                self._messages.append(_output(item, where))
            case "reasoning":
                turn = self._speaking(fresh=True)
                turn["reasoning_content"] = turn.get("reasoning_content", "") + _thoughts(item)
            case "item_reference":
                raise unsupported(f"{where}.type", "nothing is stored here; send the item itself")
            case _:
                raise unsupported(f"{where}.type", f"items of type {str(kind)[:64]!r} are unknown")

    def _message(self, item: Json, where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise invalid(f"`{where}.role` must be one of {', '.join(_ROLES)}", f"{where}.role")
        content = _content(item.get("content"), f"{where}.content")
        if role == "assistant":
            self._speaking(fresh=True)["content"] = content
        else:
            self._end_turn()
            self._messages.append({"role": role, "content": content})

    def _speaking(self, *, fresh: bool = False) -> Json:
        """The assistant's turn; a new one if the last one is past the point of what comes next."""
        if self._turn is not None and fresh and self._turn.keys() & {"content", "tool_calls"}:
            self._end_turn()
        if self._turn is None:
            self._turn = {"role": "assistant"}
        return self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._messages.append({"content": "", **self._turn})
            self._turn = None


def _content(content: Any, where: str) -> str | list[Json]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"`{where}` must be a text or a list of parts", where)
    return [_part(part, f"{where}.{at}") for at, part in enumerate(content)]


def _part(part: Any, where: str) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    name = _TEXT_PARTS.get(str(kind))
    if name is None:
        raise unsupported(f"{where}.type", f"parts of type {str(kind)[:32]!r} are no text")
    if not isinstance(part.get(name), str):
        raise invalid(f"`{where}.{name}` must be a string", f"{where}.{name}")
    return {"type": "text", "text": part[name]}


def _call(item: Json, where: str) -> Json:
    for field in ("call_id", "name", "arguments"):
        if not isinstance(item.get(field), str):
            raise invalid(f"`{where}.{field}` must be a string", f"{where}.{field}")
    if not _is_object(item["arguments"]):
        text = f"`{where}.arguments` must be a JSON object, written as text"
        raise invalid(text, f"{where}.arguments")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _is_object(text: str) -> bool:
    """Whether a text is what a call's arguments may be, which is nothing, too."""
    try:
        return not text.strip() or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _output(item: Json, where: str) -> Json:
    if not isinstance(item.get("call_id"), str):
        raise invalid(f"`{where}.call_id` must be a string", f"{where}.call_id")
    content = _content(item.get("output"), f"{where}.output")
    message = {"role": "tool", "tool_call_id": item["call_id"], "content": content}
    return message | ({"name": item["name"]} if isinstance(item.get("name"), str) else {})


def _thoughts(item: Json) -> str:
    """The thoughts themselves, or if there are none their summary."""
    for field in ("content", "summary"):
        parts = item.get(field)
        listed = parts if isinstance(parts, list) else ()
        texts = [part.get("text") for part in listed if isinstance(part, dict)]
        if texts:
            return "\n\n".join(text for text in texts if isinstance(text, str))
    return ""


def tools_of(body: ResponsesRequest) -> tuple[Tool, ...]:
    """Returns the functions that a request offers. Raises RequestError."""
    return tuple(_tool(tool, f"tools.{number}") for number, tool in enumerate(body.tools or ()))


def _tool(tool: Json, where: str) -> Tool:
    kind = tool.get("type")
    if kind != "function":
        advice = f"only functions are there, not {str(kind)[:64]!r}"
        raise unsupported(f"{where}.type", advice)
    if tool.get("defer_loading"):
        raise unsupported(f"{where}.defer_loading")
    if not isinstance(tool.get("name"), str):
        raise invalid(f"`{where}.name` must be a string", f"{where}.name")
    parameters = tool.get("parameters") or NO_PARAMETERS
    if not isinstance(parameters, dict):
        raise invalid(f"`{where}.parameters` must be a JSON schema", f"{where}.parameters")
    function = {name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None}
    entry = {"type": "function", "function": {**function, "parameters": parameters}}
    return Tool(tool["name"], parameters, entry)
