"""What a chat asks for and what it gets, the same for every protocol.

OpenAI's chat completions and responses, Anthropic's messages and ``router.v1.Inference.Chat`` are
translated into a ``ChatAsk``; ``router/chat.py`` answers it with ``ChatChunk``s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from router.ask import Finish, Params, TokenOut


class ToolMode(Enum):
    """Whether the model may, must or must not call tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    ``parameters`` is the JSON schema of its arguments. ``entry`` is the tool as the chat template
    gets it: OpenAI's ``{"type": "function", "function": {...}}``.
    """

    name: str
    parameters: Mapping[str, Any]
    entry: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatAsk:
    """A conversation to answer.

    ``messages`` are as the chat template gets them: each has ``role`` and ``content`` (a text, or a
    list of typed parts), an assistant's may have ``tool_calls`` in OpenAI's shape whose
    ``arguments`` are objects, a tool's has ``tool_call_id`` and perhaps ``name``. ``tool`` is the
    one function that must be called, or None; ``mode`` is then REQUIRED. ``params.constraint`` is
    for the text of an answer, and excludes a mode of REQUIRED. ``variables`` are what the client
    sets for the template (chat_template_kwargs). ``opening`` ends the prompt with the header of an
    answer; ``continuing`` goes on with the last message instead, and None does so if that is the
    assistant's, has no calls, and the template shows its text. ``template`` names one of the
    model's templates; None is the default, or ``tool_use`` if there are tools and it is there.
    ``reasoning`` False leaves the thoughts of a model in its text.
    """

    messages: Sequence[Mapping[str, Any]]
    params: Params = field(default_factory=Params)
    model: str | None = None
    adapter: str = ""
    priority: int = 1
    deadline_s: float | None = None
    tools: tuple[Tool, ...] = ()
    mode: ToolMode = ToolMode.AUTO
    tool: str | None = None
    parallel_calls: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    opening: bool = True
    continuing: bool | None = False
    template: str | None = None
    reasoning: bool = True


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What a chunk adds to one tool call.

    ``index`` counts the calls of an answer from 0. ``id`` and ``name`` are set on its first delta
    and None on all others; ``arguments`` is the next piece of JSON text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Call:
    """A whole tool call. ``arguments`` is JSON text, an object unless the answer was cut short."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatFinish:
    """How a chat answer ended: ``text``, ``reasoning`` and ``calls`` are all of it.

    ``finish`` has the reason, the counts and the raw text. ``called`` says that the answer ended in
    order with tool calls, which is OpenAI's ``tool_calls`` and Anthropic's ``tool_use``.
    ``reasoning_tokens`` counts those of the chunks that came within the thoughts.
    """

    finish: Finish
    text: str
    reasoning: str
    calls: tuple[Call, ...]
    called: bool
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """What came since the last chunk; each part may be empty. ``finish`` is set on the last."""

    tokens: tuple[TokenOut, ...]
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish: ChatFinish | None = None
