"""Bodies and answers of OpenAI's responses."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from router.api.rest.body import Body
from router.api.rest.models_openai import ABSENT, CacheRetention, ServiceTier

UNSTORED = "Refused unless it is null: nothing is stored here."
NO_EFFECT = "Accepted without effect."
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class TextFormat(Body):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="The kind.")
    name: str | None = Field(default=None, description="With json_schema, for the client's logs.")
    definition: dict[str, Any] | bool | None = Field(
        default=None, alias="schema", description="The schema, with json_schema."
    )
    description: str | None = Field(default=None, description=NO_EFFECT)
    strict: bool | None = Field(
        default=None, description=f"{NO_EFFECT} Answers always follow the schema."
    )


class TextOptions(Body):
    """About the text of an answer."""

    format: TextFormat | None = Field(default=None, description="Default: any text.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None,
        description="Handed to the chat template. Refused if that does not read it, unless it is "
        "the usual.",
    )


class ReasoningOptions(Body):
    """About the thoughts before an answer."""

    effort: Effort | None = Field(default=None, description="As text.verbosity.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None,
        description="Thoughts are not summarised but given as they are: only `auto` is accepted.",
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="The older name of summary."
    )
    context: Literal["auto", "current_turn", "all_turns"] | None = Field(
        default=None,
        description="The chat template decides which earlier thoughts the model sees: only `auto` "
        "is accepted.",
    )
    mode: str | None = Field(default=None, description="Only `standard` is accepted.")


class ResponseStreamOptions(Body):
    """Options of a stream."""

    include_obfuscation: bool | None = Field(
        default=None, description=f"{NO_EFFECT} Nothing is padded."
    )


class ResponsesRequest(Body):
    """Items to answer."""

    input: str | list[dict[str, Any]] = Field(
        description="A text of the user, or items: messages, function_call, function_call_output "
        "and reasoning. Other items, and parts that are not text, are refused."
    )
    model: str | None = Field(
        default=None,
        description="A model, or a LoRA adapter of one. Null, `tgi`, `dummy` and a URL mean the "
        "default one.",
    )
    instructions: str | None = Field(default=None, description="A system message before the input.")
    tools: list[dict[str, Any]] | None = Field(
        default=None,
        description='Functions: {"type": "function", "name": …, "parameters": …}. All other kinds '
        "are refused by name.",
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description="`none`, `auto`, `required`, a function's object or `allowed_tools`. Default "
        "auto.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether one answer may have several calls. Default true."
    )
    text: TextOptions | None = Field(default=None, description="What the text must be.")
    reasoning: ReasoningOptions | None = Field(default=None, description="About thoughts.")
    max_output_tokens: int | None = Field(
        default=None, ge=1, description="Tokens to generate at most, thoughts and calls included."
    )
    temperature: float | None = Field(
        default=None, description="In [0, 100]. 0 is greedy. Default 1."
    )
    top_p: float | None = Field(
        default=None, description="In [0, 1]. 1 is off, 0 leaves the likeliest token."
    )
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Report the log probabilities of so many tokens."
    )
    include: list[str] | None = Field(
        default=None,
        description="`message.output_text.logprobs` reports log probabilities. OpenAI's others "
        "speak of items that are never there, or of thoughts, which are given in the clear.",
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: ResponseStreamOptions | None = Field(
        default=None, description="Only with stream."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None,
        description="`auto` leaves out the oldest messages that are not the system's until the "
        "rest fits. Default disabled: what does not fit is refused.",
    )
    service_tier: ServiceTier | None = Field(
        default=None,
        description="`priority` and `fast` go before, `flex` after all others. The answer says it.",
    )
    metadata: dict[str, str] | None = Field(
        default=None, description="At most 16 pairs, returned with the answer."
    )
    store: bool | None = Field(
        default=None, description="Refused if true: nothing is stored here. Default false."
    )
    previous_response_id: str | None = Field(default=None, description=UNSTORED)
    conversation: Any = Field(default=None, description=UNSTORED)
    prompt: Any = Field(default=None, description=UNSTORED)
    background: bool | None = Field(default=None, description="Refused if true.")
    background_options: Any = Field(default=None, description=ABSENT)
    context_management: Any = Field(default=None, description=ABSENT)
    access_programs: Any = Field(default=None, description=ABSENT)
    image: Any = Field(default=None, description=ABSENT)
    moderation: Any = Field(default=None, description=ABSENT)
    max_tool_calls: int | None = Field(
        default=None, ge=1, description=f"{NO_EFFECT} It is about tools that OpenAI runs."
    )
    prompt_cache_key: str | None = Field(
        default=None, description=f"{NO_EFFECT} Prefixes are found by themselves."
    )
    prompt_cache_options: Any = Field(default=None, description=NO_EFFECT)
    prompt_cache_retention: CacheRetention | None = Field(default=None, description=NO_EFFECT)
    safety_identifier: str | None = Field(default=None, description=NO_EFFECT)
    user: str | None = Field(default=None, description=NO_EFFECT)
    top_k: int | None = Field(
        default=None, description="Keep the k likeliest tokens. 0 or -1 is off."
    )
    min_p: float | None = Field(
        default=None, description="Keep tokens at least this fraction as likely as the likeliest."
    )
    frequency_penalty: float | None = Field(default=None, description="In [-2, 2]. 0 is off.")
    presence_penalty: float | None = Field(default=None, description="In [-2, 2]. 0 is off.")
    repetition_penalty: float | None = Field(default=None, description="Above 0. 1 is off.")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**64, description="Equal seeds give equal answers."
    )
    stop: str | list[str] | None = Field(
        default=None, description="The answer ends where one of these appears, and is cut there."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the chat template."
    )


class ResponseLikely(BaseModel):
    """A likely token."""

    token: str = Field(description="Its text.")
    logprob: float = Field(description="Raw natural log; -9999.0 stands for minus infinity.")
    bytes: list[int] = Field(description="Its text in UTF-8.")


class ResponseLogprob(ResponseLikely):
    """A token of the text."""

    top_logprobs: list[ResponseLikely] = Field(description="The likeliest at its position.")


class OutputText(BaseModel):
    """Text of a message, or of thoughts."""

    type: Literal["output_text", "reasoning_text"] = Field(description="Which of the two.")
    text: str = Field(description="The text.")
    annotations: list[Any] = Field(default=[], description="Always empty. Not with thoughts.")
    logprobs: list[ResponseLogprob] = Field(
        default=[], description="If asked for. Not with thoughts."
    )


class OutputItem(BaseModel):
    """A part of an answer: a message, a call, or thoughts."""

    id: str = Field(description="Unique.")
    type: Literal["message", "function_call", "reasoning"] = Field(description="Its kind.")
    status: Literal["in_progress", "completed", "incomplete"] = Field(
        description="Whether it is complete."
    )
    role: Literal["assistant"] = Field(default="assistant", description="Of messages.")
    content: list[OutputText] = Field(default=[], description="Of messages and thoughts.")
    summary: list[Any] = Field(default=[], description="Of thoughts; always empty.")
    encrypted_content: str | None = Field(default=None, description="Of thoughts; always null.")
    call_id: str = Field(default="", description="Of calls: what their output refers to.")
    name: str = Field(default="", description="Of calls: the function.")
    arguments: str = Field(default="", description="Of calls: JSON text.")


class InputDetails(BaseModel):
    """About the tokens of the input."""

    cached_tokens: int = Field(description="Those that had been computed before.")
    cache_write_tokens: int = Field(description="Always 0: nothing is charged for.")


class OutputDetails(BaseModel):
    """About the tokens of the output."""

    reasoning_tokens: int = Field(description="Those of thoughts.")


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int = Field(description="Tokens of the prompt.")
    input_tokens_details: InputDetails = Field(description="More about them.")
    output_tokens: int = Field(description="Tokens generated.")
    output_tokens_details: OutputDetails = Field(description="More about them.")
    total_tokens: int = Field(description="Their sum.")


class IncompleteDetails(BaseModel):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = Field(description="It reached its length.")


class ResponseFailure(BaseModel):
    """What went wrong."""

    code: str = Field(
        description="For a program: server_error, rate_limit_exceeded or invalid_prompt."
    )
    message: str = Field(description="For a person.")


class ResponseObject(BaseModel):
    """An answer. Fields of the request that are not listed come back as they were."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(description="Unique.")
    object: Literal["response"] = Field(description="Always response.")
    created_at: int = Field(description="Seconds since 1970.")
    completed_at: int | None = Field(description="Likewise, when it is complete.")
    status: Status = Field(description="Whether it is complete.")
    error: ResponseFailure | None = Field(description="If it failed.")
    incomplete_details: IncompleteDetails | None = Field(description="If it is incomplete.")
    model: str = Field(description="The model that answered.")
    output: list[OutputItem] = Field(description="The answer, in the order in which it came.")
    usage: ResponseUsage | None = Field(description="At the end.")


class ResponseEvent(BaseModel):
    """One event of a stream; fields by its type."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(
        description="response.created, .in_progress, .output_item.added and .done, "
        ".content_part.added and .done, .output_text.delta and .done, .reasoning_text.delta and "
        ".done, .function_call_arguments.delta and .done, .completed, .incomplete, .failed."
    )
    sequence_number: int = Field(description="Counts the events from 0.")
    response: ResponseObject | None = Field(default=None, description="With the first and last.")
    output_index: int | None = Field(default=None, description="Which item it is about.")
    item: OutputItem | None = Field(default=None, description="An item as it begins or ends.")
    item_id: str | None = Field(default=None, description="The item's id.")
    content_index: int | None = Field(default=None, description="Which part of the item.")
    part: OutputText | None = Field(default=None, description="A part as it begins or ends.")
    delta: str | None = Field(default=None, description="What is added.")
    text: str | None = Field(default=None, description="The whole text, when it is done.")
    arguments: str | None = Field(default=None, description="The whole arguments, when done.")
    name: str | None = Field(default=None, description="The function, when arguments are done.")
    logprobs: list[ResponseLogprob] | None = Field(default=None, description="Of the tokens.")
