"""From Anthropic's requests to what the router's chat takes.

Its messages hold blocks; templates, and so the router, have OpenAI's shape: calls beside the text
of an assistant, and results as messages of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from router.api.rest.asks import invalid, model_name, unsupported
from router.api.rest.body import Body, check
from router.api.rest.models_anthropic import (
    AnthropicRedactedThinking,
    AnthropicText,
    AnthropicThinking,
    AnthropicTool,
    AnthropicToolResult,
    AnthropicToolUse,
    AnthropicTurn,
    Blocks,
    MessagesPrompt,
    MessagesRequest,
)
from router.api.rest.openai_hints import SWITCHES, readable
from router.ask import Constraint, Params
from router.config import Settings
from router.conversation import ChatAsk, Tool, ToolMode
from router.errors import RequestError
from router.fleet import Fleet, ModelCard
from router.text import constraints
from router.validation import SMALLEST_SHARE

B = TypeVar("B", bound=Body)
Message = dict[str, Any]

PARAGRAPH = "\n\n"
"""Between two blocks of text."""
MODES = {
    "auto": ToolMode.AUTO,
    "any": ToolMode.REQUIRED,
    "tool": ToolMode.REQUIRED,
    "none": ToolMode.NONE,
}
EFFORTS = {"xhigh": "high", "max": "high"}
"""Words for effort that templates do not have, and the nearest that they have."""
NO_INPUT: dict[str, Any] = {"type": "object", "properties": {}}


def chat_ask(body: MessagesPrompt, fleet: Fleet, settings: Settings) -> ChatAsk:
    """Returns a request as one ask. Raises RequestError."""
    _refuse(body)
    name = model_name(body.model)
    model = fleet.model(name)
    tools = tuple(_tool(tool, f"tools.{at}") for at, tool in enumerate(body.tools or ()))
    mode, tool = _choice(body, {tool.name for tool in tools})
    messages = messages_of(body)
    last = messages[-1]
    if last["role"] == "assistant" and last.get("tool_calls"):
        raise invalid("`messages` cannot end with a `tool_use` without its result", "messages")
    continuing = last["role"] == "assistant" and bool(last["content"].strip())
    choice = body.tool_choice
    return ChatAsk(
        messages=messages,
        params=_params(body, settings, forced=mode is ToolMode.REQUIRED),
        model=model.id,
        adapter=fleet.adapter(name),
        priority=0 if body.speed == "fast" else 1,
        tools=tools,
        mode=mode,
        tool=tool,
        parallel_calls=choice is None or not choice.disable_parallel_tool_use,
        variables=_variables(body, model),
        opening=not continuing,
        continuing=continuing,
    )


def ignored(body: MessagesPrompt, ask: ChatAsk) -> list[str]:
    """Returns the names of known fields that the request sets in vain."""
    names: list[str] = []
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        names.append("thinking.budget_tokens")
    effort = body.output_config is not None and body.output_config.effort is not None
    if effort and "reasoning_effort" not in ask.variables:
        names.append("output_config.effort")
    return names


def asks_for_cache(body: MessagesPrompt) -> bool:
    """Returns whether anything in the request is marked to be cached."""
    blocks = [block for turn in body.messages for block in _listed(turn.content)]
    blocks += _listed(body.system)
    marked = any(block.get("cache_control") for block in blocks)
    return bool(body.cache_control or marked or any(t.cache_control for t in body.tools or ()))


def _listed(content: str | Blocks | None) -> Blocks:
    return content if isinstance(content, list) else []


def _refuse(body: MessagesPrompt) -> None:
    if body.mcp_servers:
        raise unsupported("mcp_servers")
    if isinstance(body, MessagesRequest) and body.container is not None:
        raise unsupported("container")


# Parameters --------------------------------------------------------------------------------------


def _params(body: MessagesPrompt, settings: Settings, *, forced: bool) -> Params:
    if not isinstance(body, MessagesRequest):
        return Params()
    stops = body.stop_sequences or []
    limit = settings.max_stop_sequences
    if len(stops) > limit:
        text = f"`stop_sequences` may have up to {limit} entries. Given: {len(stops)}"
        raise invalid(text, "stop_sequences")
    if "" in stops:
        raise invalid("a stop sequence cannot be empty", "stop_sequences")
    if body.max_tokens < 1:
        raise invalid(f"`max_tokens` must be at least 1, not {body.max_tokens}", "max_tokens")
    return Params(
        max_tokens=body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        # Anthropic takes 0, which leaves the likeliest token alone.
        top_p=1.0 if body.top_p is None else body.top_p or SMALLEST_SHARE,
        stop=tuple(stops),
        # A format is for the text of an answer, and a forced call leaves none.
        constraint=None if forced else _constraint(body),
    )


def _constraint(body: MessagesPrompt) -> Constraint | None:
    config = body.output_config
    if config is not None and config.format is not None:
        if body.output_format is not None:
            text = "`output_config.format` and `output_format` exclude each other"
            raise invalid(text, "output_format")
        return constraints.json_schema(config.format.definition, "output_config.format.schema")
    if body.output_format is not None:
        return constraints.json_schema(body.output_format.definition, "output_format.schema")
    return None


def _variables(body: MessagesPrompt, model: ModelCard) -> dict[str, Any]:
    """What the chat template is told of thinking, as far as it can be told."""
    wanted: dict[str, Any] = {}
    if body.thinking is not None:
        wanted |= dict.fromkeys(SWITCHES, body.thinking.type != "disabled")
    if body.output_config is not None and body.output_config.effort is not None:
        effort = body.output_config.effort
        wanted["reasoning_effort"] = EFFORTS.get(effort, effort)
    return readable(wanted, model)


# Tools -------------------------------------------------------------------------------------------


def _tool(tool: AnthropicTool, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        kind = tool.type[:64]
        advice = f"{kind!r} is a tool of Anthropic's own; give a schema, and no type"
        raise unsupported(f"{where}.type", advice)
    if tool.defer_loading:
        raise unsupported(f"{where}.defer_loading")
    schema = tool.input_schema or NO_INPUT
    function: dict[str, Any] = {"name": tool.name, "parameters": schema}
    if tool.description is not None:
        function = {"name": tool.name, "description": tool.description, "parameters": schema}
    return Tool(tool.name, schema, {"type": "function", "function": function})


def _choice(body: MessagesPrompt, names: set[str]) -> tuple[ToolMode, str | None]:
    """Whether tools are to be called, and the one that is, if it is a certain one."""
    choice = body.tool_choice
    if choice is None or not (body.tools or choice.type in ("any", "tool")):
        return ToolMode.AUTO, None
    if choice.type != "tool":
        if choice.type == "any" and not names:
            raise invalid("`tool_choice` asks for a call, but there are no `tools`", "tool_choice")
        return MODES[choice.type], None
    if choice.name not in names:
        named = repr((choice.name or "")[:64])
        raise invalid(f"`tool_choice` names {named}, which is none of the tools", "tool_choice")
    return MODES[choice.type], choice.name


# Messages ----------------------------------------------------------------------------------------


def messages_of(body: MessagesPrompt) -> list[Message]:
    """Returns the conversation in OpenAI's shape. Raises RequestError, also if there is none."""
    if not body.messages:
        raise invalid("`messages` cannot be empty", "messages")
    out: list[Message] = []
    system = _joined(_texts(body.system or "", "system"))
    if system:
        out.append({"role": "system", "content": system})
    for at, turn in enumerate(body.messages):
        for message in _turn(turn, f"messages.{at}"):
            if out and _one(out[-1], message):
                out[-1] = _merged(out[-1], message)
            else:
                out.append(message)
    return out


def _turn(turn: AnthropicTurn, where: str) -> Iterator[Message]:
    content = turn.content
    if isinstance(content, str):
        yield {"role": turn.role, "content": content}
        return
    blocks = list(_checked(content, ALLOWED[turn.role], f"{where}.content"))
    if turn.role == "assistant":
        yield _assistant(blocks)
        return
    for at, block in enumerate(blocks):
        if isinstance(block, AnthropicToolResult):
            yield _result(block, f"{where}.content.{at}")
    texts = [block.text for block in blocks if isinstance(block, AnthropicText)]
    if texts or not blocks:
        yield {"role": turn.role, "content": _joined(texts)}


def _assistant(blocks: Sequence[Body]) -> Message:
    """An answer: its text, and beside it thoughts and calls, if there are any."""
    texts = [block.text for block in blocks if isinstance(block, AnthropicText)]
    thoughts = [block.thinking for block in blocks if isinstance(block, AnthropicThinking)]
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.input},
        }
        for block in blocks
        if isinstance(block, AnthropicToolUse)
    ]
    message: Message = {"role": "assistant", "content": _joined(texts)}
    if any(thoughts):
        message["reasoning_content"] = _joined(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _result(block: AnthropicToolResult, where: str) -> Message:
    content = _joined(_texts(block.content or "", f"{where}.content"))
    text = f"Error: {content}" if block.is_error else content
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _one(former: Message, message: Message) -> bool:
    """Whether two messages that follow each other are one; results are always apart."""
    return bool(former["role"] == message["role"] != "tool")


def _merged(former: Message, message: Message) -> Message:
    merged = {**former, **message}
    for name in ("content", "reasoning_content"):
        texts = [text for one in (former, message) if (text := one.get(name))]
        if name in merged:
            merged[name] = _joined(texts)
    calls = [*former.get("tool_calls", ()), *message.get("tool_calls", ())]
    if calls:
        merged["tool_calls"] = calls
    return merged


def _texts(content: str | Blocks, where: str) -> list[str]:
    """The texts of what may hold nothing else."""
    if isinstance(content, str):
        return [content]
    blocks = _checked(content, {"text": AnthropicText}, where)
    return [block.text for block in blocks if isinstance(block, AnthropicText)]


def _joined(texts: Sequence[str]) -> str:
    return PARAGRAPH.join(texts)


ALLOWED: dict[str, dict[str, type[Body]]] = {
    "system": {"text": AnthropicText},
    "user": {"text": AnthropicText, "tool_result": AnthropicToolResult},
    "assistant": {
        "text": AnthropicText,
        "thinking": AnthropicThinking,
        "redacted_thinking": AnthropicRedactedThinking,
        "tool_use": AnthropicToolUse,
    },
}
"""The blocks that messages of each role may have, by type."""


def _checked(blocks: Blocks, kinds: Mapping[str, type[Body]], where: str) -> Iterator[Body]:
    """The blocks, each of which must be of one of these types. Raises RequestError."""
    for at, block in enumerate(blocks):
        here = f"{where}.{at}"
        kind = block.get("type")
        if not isinstance(kind, str):
            raise invalid(f"`{here}.type`: Field required", f"{here}.type")
        if kind not in kinds:
            known = ", ".join(kinds)
            advice = f"blocks of type {kind[:64]!r} cannot be read here, only {known}"
            raise unsupported(f"{here}.type", advice)
        yield _block(block, kinds[kind], here)


def _block(block: dict[str, Any], model: type[B], where: str) -> B:
    try:
        return check(block, model)
    except RequestError as error:
        field = where if error.field is None else f"{where}.{error.field}"
        reason = error.message.partition(": ")[2]
        raise invalid(f"`{field}`: {reason}", field) from None
