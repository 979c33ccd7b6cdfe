"""Bodies and answers of Anthropic's Messages API, which the OpenAPI page is made of, too.

What becomes of each field is said here and, with reasons, in ``docs/anthropic-compatibility.md``.
Fields that are not there are ignored, and named in ``x-ignored-parameters``.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from router.api.rest.body import Body

NO_EFFECT = "Accepted without effect."
CACHE = "Reports in `usage` what of the prompt was computed already; caching needs no mark."
Blocks = list[dict[str, Any]]


class AnthropicText(Body):
    """Text, in a message, a system prompt or the result of a tool."""

    type: Literal["text"] = Field(description="Says that this is text.")
    text: str = Field(description="The text.")
    cache_control: dict[str, Any] | None = Field(default=None, description=CACHE)
    citations: list[dict[str, Any]] | None = Field(default=None, description=NO_EFFECT)


class AnthropicThinking(Body):
    """Thoughts of an earlier answer."""

    type: Literal["thinking"] = Field(description="Says that these are thoughts.")
    thinking: str = Field(description="The thoughts, for templates that show them.")
    signature: str | None = Field(default=None, description=NO_EFFECT)


class AnthropicRedactedThinking(Body):
    """Thoughts that nobody here can read; left out."""

    type: Literal["redacted_thinking"] = Field(description="Says that these are hidden thoughts.")
    data: str = Field(default="", description="Not read.")


class AnthropicToolUse(Body):
    """A call of an earlier answer."""

    type: Literal["tool_use"] = Field(description="Says that this is a call.")
    id: str = Field(description="Names the call.")
    name: str = Field(description="The tool.")
    input: dict[str, Any] = Field(description="Its arguments.")
    cache_control: dict[str, Any] | None = Field(default=None, description=CACHE)
    caller: dict[str, Any] | None = Field(default=None, description=NO_EFFECT)


class AnthropicToolResult(Body):
    """What came of a call."""

    type: Literal["tool_result"] = Field(description="Says that this is a result.")
    tool_use_id: str = Field(description="The id of the call.")
    content: str | Blocks | None = Field(default=None, description="Text, or blocks of text.")
    is_error: bool | None = Field(default=None, description="Puts `Error: ` before the content.")
    cache_control: dict[str, Any] | None = Field(default=None, description=CACHE)


class AnthropicTurn(Body):
    """One message. Messages of one role that follow each other are one message."""

    role: Literal["user", "assistant", "system"] = Field(description="Who says it.")
    content: str | Blocks = Field(
        description="Text, or blocks: `text`; of an assistant also `thinking`, `redacted_thinking` "
        "and `tool_use`; of a user also `tool_result`."
    )


class AnthropicTool(Body):
    """A tool that the model may call. Tools that would run on the server are refused."""

    type: str | None = Field(default=None, description="`custom`, or nothing.")
    name: str = Field(description="Letters, digits, `_`, `-` and `.`, 128 at most.")
    description: str | None = Field(default=None, description="For the model.")
    input_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the tool's input, which is an object."
    )
    cache_control: dict[str, Any] | None = Field(default=None, description=CACHE)
    strict: bool | None = Field(
        default=None, description="Accepted without effect: forced calls always follow the schema."
    )
    input_examples: list[dict[str, Any]] | None = Field(default=None, description=NO_EFFECT)
    eager_input_streaming: bool | None = Field(
        default=None,
        description="Accepted without effect: inputs are always streamed at once.",
    )
    defer_loading: bool | None = Field(
        default=None, description="Refused if true: every tool is shown to the model."
    )
    allowed_callers: list[str] | None = Field(default=None, description=NO_EFFECT)


class AnthropicToolChoice(Body):
    """Whether tools may, must or must not be called."""

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="`any`: a call of any tool; `tool`: of the named one."
    )
    name: str | None = Field(default=None, description="With `tool`: the one to call.")
    disable_parallel_tool_use: bool | None = Field(default=None, description="One call at most.")


class AnthropicThoughts(Body):
    """Whether the model should think before it answers, where its chat template can be told."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = Field(
        description="All but `disabled` let the model think. Unset: as the template has it."
    )
    budget_tokens: int | None = Field(
        default=None, description="Ignored, and named in `x-ignored-parameters`."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="`omitted` leaves the text of thoughts out of the answer."
    )


class AnthropicFormat(Body):
    """What the text of the answer must be."""

    type: Literal["json_schema"] = Field(description="The one kind that there is.")
    definition: dict[str, Any] = Field(alias="schema", description="The JSON schema.")


class AnthropicOutput(Body):
    """How the answer should be."""

    format: AnthropicFormat | None = Field(default=None, description="What the text must be.")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None,
        description="Given to chat templates that read `reasoning_effort`; else ignored, and named "
        "in `x-ignored-parameters`.",
    )


class AnthropicMetadata(Body):
    """About the request."""

    user_id: str | None = Field(default=None, description=NO_EFFECT)


class MessagesPrompt(Body):
    """What a prompt is made of."""

    model: str = Field(description="A model, or a LoRA adapter of one.")
    messages: list[AnthropicTurn] = Field(
        description="If the last one is the assistant's, the answer continues it."
    )
    system: str | Blocks | None = Field(default=None, description="Text, or blocks of text.")
    tools: list[AnthropicTool] | None = Field(default=None, description="Tools that may be called.")
    tool_choice: AnthropicToolChoice | None = Field(default=None, description="Default: auto.")
    thinking: AnthropicThoughts | None = Field(default=None, description="Whether to think first.")
    output_config: AnthropicOutput | None = Field(
        default=None, description="How the answer should be."
    )
    output_format: AnthropicFormat | None = Field(
        default=None, description="The older place of `output_config.format`."
    )
    cache_control: dict[str, Any] | None = Field(default=None, description=CACHE)
    mcp_servers: list[dict[str, Any]] | None = Field(
        default=None, description="Refused: nothing here connects to servers."
    )
    speed: Literal["standard", "fast"] | None = Field(
        default=None, description="`fast` goes before other requests."
    )


class CountRequest(MessagesPrompt):
    """A request of `/v1/messages/count_tokens`."""


class MessagesRequest(MessagesPrompt):
    """A request of `/v1/messages`."""

    max_tokens: int = Field(description="Tokens to generate at most, at least 1.")
    stop_sequences: list[str] | None = Field(
        default=None, description="The answer ends where one of these appears, and is cut there."
    )
    temperature: float | None = Field(
        default=None, description="In [0, 100]; Anthropic takes up to 1. 0 is greedy. Default 1."
    )
    top_p: float | None = Field(
        default=None, description="In [0, 1]. 1 is off, 0 leaves the likeliest token."
    )
    top_k: int | None = Field(default=None, description="Keep the k likeliest tokens. 0 is off.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    metadata: AnthropicMetadata | None = Field(default=None, description="Accepted without effect.")
    service_tier: Literal["auto", "standard_only"] | None = Field(
        default=None, description="Accepted; both have the same place in the queue."
    )
    container: Any = Field(default=None, description="Refused unless it is null.")


class AnthropicUsage(BaseModel):
    """Tokens. The prompt has the sum of the three that say input."""

    input_tokens: int = Field(description="Of the prompt, but for those read from the cache.")
    cache_creation_input_tokens: int = Field(description="Always 0.")
    cache_read_input_tokens: int = Field(
        description="Of the prompt, computed already for another request. 0 unless the request has "
        "a `cache_control`."
    )
    output_tokens: int = Field(description="Generated tokens, thoughts and calls included.")
    service_tier: Literal["standard", "priority"] = Field(
        description="`priority` with the speed `fast`."
    )


class AnthropicMessage(BaseModel):
    """A whole answer."""

    id: str = Field(description="Unique.")
    type: Literal["message"] = Field(description="Always `message`.")
    role: Literal["assistant"] = Field(description="Always `assistant`.")
    model: str = Field(description="The model or adapter that answered.")
    content: list[dict[str, Any]] = Field(
        description="Blocks in the order in which they were made: `thinking`, `text`, `tool_use`."
    )
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None = Field(
        description="Why it ended; null in message_start."
    )
    stop_sequence: str | None = Field(description="The stop sequence that appeared, if one did.")
    usage: AnthropicUsage = Field(description="Token counts.")


class AnthropicEvent(BaseModel):
    """An event of a stream.

    It begins with message_start. Each block has content_block_start, some content_block_delta and
    content_block_stop. At the end are message_delta and message_stop, or error if the answer broke
    off. A ping may come at any time.
    """

    type: str = Field(description="Which event it is.")
    message: AnthropicMessage | None = Field(
        default=None, description="In message_start: the message, still empty."
    )
    index: int | None = Field(default=None, description="The block's place in the content.")
    content_block: dict[str, Any] | None = Field(
        default=None, description="In content_block_start: the block, still empty."
    )
    delta: dict[str, Any] | None = Field(
        default=None, description="What comes to the block, or how the message ended."
    )
    usage: dict[str, int] | None = Field(
        default=None, description="In message_delta: final counts."
    )
    error: dict[str, str] | None = Field(default=None, description="In error: what went wrong.")


class TokenCount(BaseModel):
    """How many tokens a prompt has."""

    input_tokens: int = Field(description="Tokens of the prompt.")


class AnthropicFault(BaseModel):
    """What went wrong."""

    type: str = Field(description="By which programs decide, beside the status.")
    message: str = Field(description="For people.")


class AnthropicError(BaseModel):
    """Every error of these routes."""

    type: Literal["error"] = Field(description="Always `error`.")
    error: AnthropicFault = Field(description="What went wrong.")
    request_id: str | None = Field(description="As in the header `request-id`.")


DOCUMENTED: tuple[type[BaseModel], ...] = (
    MessagesRequest,
    CountRequest,
    AnthropicEvent,
    AnthropicText,
    AnthropicThinking,
    AnthropicRedactedThinking,
    AnthropicToolUse,
    AnthropicToolResult,
)
"""What the OpenAPI page shows though no route has it as a parameter."""
