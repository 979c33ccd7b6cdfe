"""Bodies and answers of OpenAI's chat completions."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from router.api.rest.body import Body, Checked
from router.api.rest.models_openai import (
    ABSENT,
    CacheRetention,
    PromptLogprobs,
    SamplingFields,
    Usage,
)

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class FunctionCall(Body):
    """A call that an assistant made earlier in the conversation."""

    name: str = Field(description="The function's name.")
    arguments: str | dict[str, Any] = Field(
        description="Its arguments: a JSON object as text. TGI's clients send the object itself."
    )


class ToolCall(Body):
    """A tool call of an earlier answer, as it was received."""

    id: str | None = Field(default=None, description="The id, to which the tool's message refers.")
    type: Literal["function"] = Field(default="function", description="Always function.")
    function: FunctionCall = Field(description="The call.")


class Message(Checked):
    """One message of a conversation. Further fields are handed to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="Who speaks. A template that knows no `developer` is handed `system`."
    )
    content: str | list[dict[str, Any]] | None = Field(
        default=None,
        description='Text, or parts: {"type": "text", "text": …}, or a refusal. Other kinds are '
        "refused.",
    )
    name: str | None = Field(default=None, description="The speaker's name, or the function's.")
    tool_calls: list[ToolCall] | None = Field(
        default=None, description="What an assistant has called."
    )
    function_call: FunctionCall | None = Field(
        default=None, description="OpenAI's older tool_calls."
    )
    tool_call_id: str | None = Field(default=None, description="Which call a tool's text answers.")
    refusal: str | None = Field(
        default=None, description="An assistant's words where it has no content."
    )
    audio: Any = Field(default=None, description=ABSENT)


class Function(Body):
    """A function that the model may call."""

    name: str = Field(
        description="1 to 128 letters, digits, underscores, dashes and dots.",
    )
    description: str | None = Field(default=None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="The JSON schema of its arguments. Unset: it takes none."
    )
    arguments: dict[str, Any] | None = Field(
        default=None, description="TGI's other name for the parameters."
    )
    strict: bool | None = Field(
        default=None,
        description="Accepted without effect: forced calls always follow the schema, and the model "
        "is free in calls of its own accord.",
    )


class ToolEntry(Body):
    """A tool that the model may call."""

    type: Literal["function"] = Field(
        default="function", description="Only functions: `custom` tools are refused."
    )
    function: Function = Field(description="The function.")


class Prediction(Body):
    """What an answer is expected to be."""

    type: Literal["content"] = Field(description="Always content.")
    content: str | list[dict[str, Any]] = Field(description="Text, or parts of the type text.")


class ChatRequest(SamplingFields):
    """A conversation to answer."""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        default=None, description="OpenAI's newer max_tokens, which it goes before."
    )
    logprobs: bool | None = Field(default=None, description="Report the tokens' log probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="And of this many likeliest at each position."
    )
    tools: list[ToolEntry] | None = Field(default=None, description="What the model may call.")
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description="`none`, `auto`, `required`, a function by OpenAI's object or its name alone, "
        "or `allowed_tools`. Default auto.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether one answer may have several calls. Default true."
    )
    functions: list[Function] | None = Field(default=None, description="OpenAI's older tools.")
    function_call: str | dict[str, Any] | None = Field(
        default=None, description="OpenAI's older tool_choice: `none`, `auto`, or a name's object."
    )
    tool_prompt: str | None = Field(
        default=None, description="TGI's: appended to the last message if there are tools."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(
            default=None,
            description="Handed to the chat template. Refused if that does not read it, unless it "
            "changes nothing.",
        )
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="As reasoning_effort."
    )
    separate_reasoning: bool | None = Field(
        default=None, description="Report thoughts apart from the text. Default true."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the chat template."
    )
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="Documents, for a chat template that reads them."
    )
    guideline: str | None = Field(
        default=None, description="TGI's: a guideline, for a chat template that reads it."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="End the prompt with the header of the answer. Default true."
    )
    continue_final_message: bool | None = Field(
        default=None,
        description="Go on with the last message instead of answering it. Default: if that is the "
        "assistant's and has a text, as in TGI; not if add_generation_prompt is given.",
    )
    metadata: dict[str, str] | None = Field(
        default=None, description="At most 16 pairs, which the answer repeats."
    )
    store: bool | None = Field(
        default=None, description="True is refused: answers are not stored here."
    )
    modalities: list[str] | None = Field(default=None, description='Only ["text"].')
    prediction: Prediction | None = Field(
        default=None, description="Accepted without effect: it can only save time."
    )
    safety_identifier: str | None = Field(default=None, description="Accepted without effect.")
    prompt_cache_key: str | None = Field(
        default=None, description="Accepted without effect: common prefixes are always shared."
    )
    prompt_cache_options: dict[str, Any] | None = Field(
        default=None, description="As prompt_cache_key."
    )
    prompt_cache_retention: CacheRetention | None = Field(
        default=None, description="As prompt_cache_key."
    )
    audio: Any = Field(default=None, description=ABSENT)
    moderation: Any = Field(default=None, description=ABSENT)
    web_search_options: Any = Field(default=None, description=ABSENT)
    chat_template: str | None = Field(
        default=None, description="The name of one of the model's templates; not a template."
    )


class TopLogprob(BaseModel):
    """A likely token."""

    token: str = Field(description="Its text.")
    logprob: float = Field(description="Raw natural log; -9999.0 stands for minus infinity.")
    bytes: list[int] = Field(description="Its text in UTF-8.")


class TokenLogprob(TopLogprob):
    """A generated token."""

    top_logprobs: list[TopLogprob] = Field(description="The likeliest tokens at its position.")


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer."""

    content: list[TokenLogprob] = Field(
        description="One for each token, those of thoughts and calls too, special ones left out."
    )
    refusal: None = Field(description="Always null: refusals are text here.")


class AnsweredFunction(BaseModel):
    """What is called."""

    name: str = Field(description="The function's name.")
    arguments: str = Field(
        description="Its arguments as JSON; an object unless the answer was cut short."
    )


class AnsweredCall(BaseModel):
    """A tool that the model calls."""

    id: str = Field(description="Unique.")
    type: Literal["function"] = Field(description="Always function.")
    function: AnsweredFunction = Field(description="The call.")


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = Field(description="Always assistant.")
    content: str | None = Field(description="Its text; null if there are only calls.")
    refusal: None = Field(description="Always null: refusals are text here.")
    reasoning_content: str | None = Field(
        default=None, description="The model's thoughts, if there are any."
    )
    reasoning: str | None = Field(default=None, description="The same, by its other name.")
    tool_calls: list[AnsweredCall] | None = Field(default=None, description="If it calls any.")
    function_call: AnsweredFunction | None = Field(
        default=None, description="Instead of tool_calls, if the request had functions."
    )


class ChatChoice(BaseModel):
    """One answer."""

    index: int = Field(description="Its number, from 0.")
    message: AnswerMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason = Field(description="Why it ended.")
    token_ids: list[int] | None = Field(
        default=None, description="The ids of its tokens, with return_token_ids."
    )


class ChatCompletion(BaseModel):
    """All answers to a conversation."""

    id: str = Field(description="Unique.")
    object: Literal["chat.completion"] = Field(description="Always chat.completion.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answered.")
    system_fingerprint: str = Field(description="Changes with what computes the answers.")
    service_tier: Literal["default", "flex", "priority"] | None = Field(
        default=None, description="What was used, if the request had one."
    )
    choices: list[ChatChoice] = Field(description="One for each of n.")
    usage: Usage = Field(description="Token counts.")
    metadata: dict[str, str] | None = Field(default=None, description="The request's.")
    prompt_logprobs: PromptLogprobs | None = Field(default=None, description="If asked for.")
    prompt_token_ids: list[int] | None = Field(
        default=None, description="The ids of the prompt's tokens, with return_token_ids."
    )


class DeltaFunction(BaseModel):
    """What an event adds to a call."""

    name: str | None = Field(default=None, description="On the first event of a call.")
    arguments: str = Field(description="Text to append.")


class DeltaCall(BaseModel):
    """A part of a tool call."""

    index: int = Field(description="The call's number within the answer, from 0.")
    id: str | None = Field(default=None, description="On the first event of a call.")
    type: Literal["function"] | None = Field(default=None, description="Likewise.")
    function: DeltaFunction = Field(description="What is added.")


class Delta(BaseModel):
    """What an event adds to the answer."""

    role: str | None = Field(default=None, description="On the first event of a choice.")
    content: str | None = Field(default=None, description="Text to append.")
    refusal: None = Field(default=None, description="Null, on the first event.")
    reasoning_content: str | None = Field(default=None, description="Thoughts to append.")
    reasoning: str | None = Field(default=None, description="The same, by its other name.")
    tool_calls: list[DeltaCall] | None = Field(default=None, description="Parts of calls.")
    function_call: DeltaFunction | None = Field(
        default=None, description="Instead of tool_calls, if the request had functions."
    )


class ChunkChoice(BaseModel):
    """A part of one answer."""

    index: int = Field(description="The answer's number, from 0.")
    delta: Delta = Field(description="What it adds.")
    logprobs: ChatLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason | None = Field(description="On the last event of a choice.")
    token_ids: list[int] | None = Field(
        default=None, description="The ids of what it adds, with return_token_ids."
    )


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str = Field(description="The same on all events of a stream.")
    object: Literal["chat.completion.chunk"] = Field(description="Always so.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answers.")
    system_fingerprint: str = Field(description="Changes with what computes the answers.")
    service_tier: Literal["default", "flex", "priority"] | None = Field(
        default=None, description="What is used, if the request had one."
    )
    choices: list[ChunkChoice] = Field(description="One, or none on the usage event.")
    usage: Usage | None = Field(default=None, description="On the usage event.")
    prompt_token_ids: list[int] | None = Field(
        default=None, description="On the first event of each choice, with return_token_ids."
    )
