"""Telling a model of tools that its chat template has no words for.

The tools go into the system message, calls and their results into messages that every template can
lay out: a call becomes the text that the model is asked to write, a result a message of the user.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from router.text.tools.formats import PLAIN, ToolFormat

Message = Mapping[str, Any]

_TOOLS = """\
You can call these functions, each described by a JSON schema of its arguments:
{tools}

{how}{when}"""
_ONE = """\
To call a function, answer with this JSON and nothing else:
{"name": "<name of the function>", "arguments": {"<name of an argument>": <its value>}}
"""
_SEVERAL = """\
To call several, answer with a JSON list of such objects.
"""
_MAY = "You will be given the result. If no function is needed, answer in plain text."
_MUST = "You will be given the result. Now a function has to be called."


def with_tools(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    several: bool,
    must: bool,
    system: bool,
) -> list[Message]:
    """The conversation with a description of the tools.

    ``system`` says that the template takes a system message; else the first message has them.
    """
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    how = _ONE + (_SEVERAL if several else "")
    text = _TOOLS.format(tools=lines, how=how, when=_MUST if must else _MAY)
    first = messages[0]
    if system and first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    parts = (first["content"], text) if first["role"] == "system" else (text, first["content"])
    return [{**first, "content": joined(parts)}, *messages[1:]]


def plain_messages(messages: Iterable[Message]) -> list[Message]:
    """The conversation with calls and results as text; contents are texts or lists of parts."""
    out: list[Message] = []
    was_result = False
    for message in messages:
        if message["role"] != "tool":
            out.append(with_calls_as_text(message, PLAIN))
            was_result = False
            continue
        text = _result(message)
        if was_result:
            # Results of calls made together are one turn: many templates want turns to alternate.
            text = f"{out.pop()['content']}\n{text}"
        out.append({"role": "user", "content": text})
        was_result = True
    return out


def with_calls_as_text(message: Message, form: ToolFormat) -> Message:
    """The message with its calls as the model wrote them."""
    if not message.get("tool_calls"):
        return message
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    text = form.written(message["tool_calls"])
    return {**rest, "content": joined((message["content"], text))}


def _result(message: Message) -> str:
    name = message.get("name") or "the function"
    return f"Result of {name}:\n{text_of(message['content'])}"


def joined(contents: Iterable[Any]) -> str:
    """Contents of messages as one text, a paragraph for each."""
    return "\n\n".join(filter(None, map(text_of, contents)))


def text_of(content: Any) -> str:
    """A message's content as one text."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
