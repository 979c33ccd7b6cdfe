"""Tools and the choice among them, from OpenAI's shapes, its older ones, and TGI's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from router.api.rest.asks import invalid, unsupported
from router.api.rest.models_chat import ChatRequest, Function
from router.conversation import Tool, ToolMode

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Choice:
    """The tools that may be called; ``tool`` is the one that must be, if it is a certain one.

    ``legacy`` says that the client speaks of functions, and wants answers that do.
    """

    tools: tuple[Tool, ...] = ()
    mode: ToolMode = ToolMode.AUTO
    tool: str | None = None
    legacy: bool = False


def tools_of(body: ChatRequest) -> Choice:
    """Returns what a request says of tools. Raises RequestError."""
    legacy = bool(body.functions)
    if legacy and body.tools:
        raise invalid("`functions` and `tools` exclude each other", "functions")
    functions = body.functions or [] if legacy else [tool.function for tool in body.tools or []]
    tools = tuple(map(_tool, functions))
    _check_form(body, legacy=legacy)
    if legacy:
        return chosen(Choice(tools, legacy=True), body.function_call, "function_call")
    return chosen(Choice(tools), body.tool_choice, "tool_choice")


def _check_form(body: ChatRequest, *, legacy: bool) -> None:
    """A choice is of the form that the tools have; else it would choose nothing, unnoticed."""
    asked, field, other = (
        (body.tool_choice, "tool_choice", "tools")
        if legacy
        else (body.function_call, "function_call", "functions")
    )
    offered = legacy or bool(body.tools)
    if asked not in (None, "auto") and (offered or asked != "none"):
        raise invalid(f"`{field}` needs `{other}`", field)


def _tool(function: Function) -> Tool:
    """A tool as the chat template gets it: the client's own fields, the schema always there."""
    given = function.model_dump(exclude_none=True, exclude={"arguments"})
    given["parameters"] = function.parameters or function.arguments or NO_PARAMETERS
    entry = {"type": "function", "function": given}
    return Tool(function.name, given["parameters"], entry)


def chosen(all_of: Choice, asked: str | dict[str, Any] | None, field: str) -> Choice:
    """Returns the choice among these tools that ``field`` asks for. Raises RequestError."""
    if asked in (None, "auto"):
        return all_of
    if asked == "none":
        return replace(all_of, mode=ToolMode.NONE)
    if not all_of.tools:
        raise invalid(f"`{field}` needs tools to choose from", field)
    if asked == "required" and not all_of.legacy:
        return replace(all_of, mode=ToolMode.REQUIRED)
    if isinstance(asked, dict) and asked.get("type") == "allowed_tools":
        return _allowed(all_of, asked, field)
    name = asked if isinstance(asked, str) else _name(asked, field)
    if name not in {tool.name for tool in all_of.tools}:
        raise invalid(f"`{field}` names {str(name)[:64]!r}, which is none of the tools", field)
    return replace(all_of, mode=ToolMode.REQUIRED, tool=name)


def _name(asked: Any, field: str) -> str:
    """The name in `{"type": "function", "function": {"name": …}}`, or in the older, bare form."""
    if isinstance(asked, dict):
        kind = asked.get("type", "function")
        if kind != "function":
            raise unsupported(field, f"{str(kind)[:64]!r} is not there; choose a function")
        function = asked.get("function", asked)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise invalid(f"`{field}` must be a word or an object that names a function", field)


def _allowed(all_of: Choice, asked: dict[str, Any], field: str) -> Choice:
    """OpenAI's `allowed_tools`: only those are shown to the model, so it cannot call others."""
    # The SDK nests the object under its own name; the documentation of other routes does not.
    given = asked.get("allowed_tools", asked)
    where = f"{field}.allowed_tools"
    entries = given.get("tools") if isinstance(given, dict) else None
    if not isinstance(entries, list) or not entries:
        raise invalid(f"`{where}` needs a list of tools", where)
    names = {_name(entry, where) for entry in entries}
    unknown = sorted(names - {tool.name for tool in all_of.tools})
    if unknown:
        raise invalid(f"`{where}` names {unknown[0][:64]!r}, which is none of the tools", where)
    tools = tuple(tool for tool in all_of.tools if tool.name in names)
    modes = {"auto": ToolMode.AUTO, "required": ToolMode.REQUIRED}
    mode = modes.get(str(given.get("mode", "auto")))
    if mode is None:
        raise invalid(f"`{where}.mode` must be auto or required", f"{where}.mode")
    return replace(all_of, tools=tools, mode=mode)


def with_tool_prompt(
    messages: Sequence[dict[str, Any]], prompt: str | None
) -> list[dict[str, Any]]:
    """Appends TGI's `tool_prompt` to the last message, as TGI does."""
    if not prompt:
        return list(messages)
    *others, last = messages
    content = last["content"]
    appended: Any = f"{content}\n---\n{prompt}"
    if isinstance(content, list):
        appended = [*content, {"type": "text", "text": f"\n---\n{prompt}"}]
    return [*others, {**last, "content": appended}]
