"""From ``ChatRequest`` messages to what every protocol's chat is."""

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict

from router.api.grpc_convert import json_object, params_of, priority_of
from router.conversation import ChatAsk, Tool, ToolMode
from router.errors import Fault, RequestError
from router.v1 import router_pb2 as pb

ROLES = ("system", "developer", "user", "assistant", "tool")
MODES = {
    pb.TOOL_MODE_UNSPECIFIED: ToolMode.AUTO,
    pb.TOOL_MODE_AUTO: ToolMode.AUTO,
    pb.TOOL_MODE_NONE: ToolMode.NONE,
    pb.TOOL_MODE_REQUIRED: ToolMode.REQUIRED,
}
NAMES = {
    "chat_template": "template",
    "chat_template_kwargs": "template_variables",
    "continue_final_message": "continuing",
}


def field_name(field: str) -> str:
    """Returns what a field of a chat is called here: ``messages[0].tool_calls[1].arguments``."""
    return NAMES.get(field, re.sub(r"\.(\d+)", r"[\1]", field.replace(".function", "")))


def chat_ask(request: pb.ChatRequest, deadline_s: float | None) -> ChatAsk:
    """Returns the conversation to answer. Raises RequestError, VALIDATION."""
    mode, tool = _choice_of(request)
    if request.continuing and request.opening:
        raise _invalid("`opening` and `continuing` exclude each other", "opening")
    return ChatAsk(
        messages=[_message_of(one, f"messages[{n}]") for n, one in enumerate(request.messages)],
        params=params_of(request.parameters),
        model=request.model or None,
        adapter=request.adapter,
        priority=priority_of(request),
        deadline_s=deadline_s,
        tools=tuple(_tool_of(one, f"tools[{n}]") for n, one in enumerate(request.tools)),
        mode=mode,
        tool=tool,
        parallel_calls=_unless_set(request, "parallel_tool_calls", True),
        variables=_plain(MessageToDict(request.template_variables)),
        opening=_unless_set(request, "opening", not request.continuing),
        continuing=request.continuing,
        template=request.template or None,
        reasoning=_unless_set(request, "reasoning", True),
    )


def _unless_set(request: pb.ChatRequest, field: str, value: bool) -> bool:
    """The value of an optional switch, or this one where it is left unset."""
    return bool(getattr(request, field)) if request.HasField(field) else value


def _plain(value: Any) -> Any:
    """A JSON value whose whole numbers are written without a point: a Struct knows floats only."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _choice_of(request: pb.ChatRequest) -> tuple[ToolMode, str | None]:
    """Whether to call, and which function alone."""
    given = request.tool_choice
    if given.WhichOneof("choice") == "name":
        return ToolMode.REQUIRED, given.name
    if given.mode not in MODES:
        raise _invalid(f"{given.mode} is no ToolMode", "tool_choice.mode")
    return MODES[given.mode], None


def _message_of(message: pb.ChatMessage, where: str) -> Mapping[str, Any]:
    """A message as chat templates read it."""
    if message.role not in ROLES:
        raise _invalid(f"the role must be one of {', '.join(ROLES)}", f"{where}.role")
    found: dict[str, Any] = {"role": message.role, "content": _content_of(message, where)}
    if message.tool_calls:
        found["tool_calls"] = [_call_of(call) for call in message.tool_calls]
    named = {
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "reasoning_content": message.reasoning,
    }
    found.update({name: text for name, text in named.items() if text})
    return found


def _content_of(message: pb.ChatMessage, where: str) -> str | list[dict[str, str]]:
    if not message.parts:
        return message.content
    if message.content:
        raise _invalid("set content or parts, not both", f"{where}.parts")
    for number, part in enumerate(message.parts):
        if part.WhichOneof("part") is None:
            raise _invalid("the part is empty: set its text", f"{where}.parts[{number}]")
    return [{"type": "text", "text": part.text} for part in message.parts]


def _call_of(call: pb.ToolCall) -> dict[str, Any]:
    """A call in OpenAI's shape, as whose messages it is checked and laid out."""
    function = {"name": call.name, "arguments": call.arguments or "{}"}
    return {"id": call.id, "type": "function", "function": function}


def _tool_of(tool: pb.Tool, where: str) -> Tool:
    given = tool.parameters or '{"type":"object","properties":{}}'
    parameters = json_object(given, f"{where}.parameters")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = parameters
    return Tool(tool.name, parameters, {"type": "function", "function": function})


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Fault.VALIDATION, message, field)
