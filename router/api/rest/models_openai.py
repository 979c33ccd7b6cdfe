"""Bodies and answers of OpenAI's routes, for checking and for the OpenAPI page.

Fields described as not supported yet are refused by name unless they have a harmless value; see
`refusals.py`. Fields not listed here are ignored and named in ``x-ignored-parameters``.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from router.api.rest.body import Body

NOT_YET = "Not supported yet: refused."
FinishReason = Literal["stop", "length"]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(
        default=False, description="Send usage in one more event at the end."
    )


class SamplingFields(Body):
    """What both routes share: how to draw tokens, when to end, what to report."""

    model: str | None = Field(
        default=None,
        description="A model, or a LoRA adapter of one. Null, `tgi` and `dummy` mean the default.",
    )
    temperature: float | None = Field(default=None, description="0 is greedy. Default 1.")
    top_p: float | None = Field(default=None, description="In (0, 1]. 1 is off.")
    frequency_penalty: float | None = Field(default=None, description="In [-2, 2]. 0 is off.")
    presence_penalty: float | None = Field(default=None, description="In [-2, 2]. 0 is off.")
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**64,
        description="Equal seeds give equal answers. Unset: drawn.",
    )
    stop: str | list[str] | None = Field(
        default=None, description="The answer ends where one of these appears, and is cut there."
    )
    n: int | None = Field(default=None, ge=1, description="Number of answers.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    logit_bias: dict[str, float] | None = Field(
        default=None, description="Token id to what is added to its logit, in [-100, 100]."
    )
    max_tokens: int | None = Field(
        default=None, description="Tokens to generate at most. Unset: as many as fit."
    )
    service_tier: str | None = Field(
        default=None, description="`priority` goes before, `flex` after all others."
    )
    top_k: int | None = Field(
        default=None, description="Keep the k likeliest tokens. 0 or -1 is off."
    )
    min_p: float | None = Field(
        default=None, description="Keep tokens at least this fraction as likely as the likeliest."
    )
    repetition_penalty: float | None = Field(default=None, description="Above 0. 1 is off.")
    min_tokens: int | None = Field(
        default=None, description="Tokens to generate before the answer may end by itself."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Go on behind end-of-sequence tokens."
    )
    stop_token_ids: list[int] | None = Field(
        default=None, description="Further ids that end the answer."
    )
    guided_json: Any = Field(default=None, description=NOT_YET)
    guided_regex: Any = Field(default=None, description=NOT_YET)
    guided_choice: Any = Field(default=None, description=NOT_YET)
    guided_grammar: Any = Field(default=None, description=NOT_YET)
    structured_outputs: Any = Field(default=None, description=NOT_YET)
    prompt_logprobs: Any = Field(default=None, description=NOT_YET)
    use_beam_search: Any = Field(default=None, description=NOT_YET)


class Message(BaseModel):
    """One message of a conversation. Further fields are handed to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="Who speaks. `developer` is handed to the template as `system`."
    )
    content: str | list[dict[str, Any]] | None = Field(
        default=None,
        description='Text, or parts of which only {"type": "text", "text": …} is supported.',
    )


class ChatRequest(SamplingFields):
    """A conversation to answer."""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        default=None, description="OpenAI's newer max_tokens."
    )
    logprobs: bool | None = Field(default=None, description="Report the tokens' log probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="And of this many likeliest at each position."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the chat template."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="End the prompt with the header of the answer. Default true."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Go on with the last message instead of answering it."
    )
    tools: Any = Field(default=None, description=NOT_YET)
    tool_choice: Any = Field(
        default=None, description="`none` and `auto` are accepted; others refused."
    )
    functions: Any = Field(default=None, description=NOT_YET)
    function_call: Any = Field(default=None, description=NOT_YET)
    response_format: Any = Field(
        default=None, description='Only {"type": "text"} is supported yet.'
    )
    audio: Any = Field(default=None, description=NOT_YET)
    modalities: Any = Field(default=None, description='Only ["text"] is supported.')
    prediction: Any = Field(default=None, description=NOT_YET)
    reasoning_effort: Any = Field(default=None, description=NOT_YET)
    verbosity: Any = Field(default=None, description=NOT_YET)
    web_search_options: Any = Field(default=None, description=NOT_YET)


class CompletionRequest(SamplingFields):
    """Prompts to continue."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either."
    )
    logprobs: int | None = Field(
        default=None, ge=0, description="Report log probabilities, and of so many likeliest tokens."
    )
    echo: bool | None = Field(default=None, description="Put the prompt in front of the answer.")
    best_of: int | None = Field(default=None, description="Only the value of n is supported yet.")
    suffix: str | None = Field(default=None, description=NOT_YET)
    response_format: Any = Field(
        default=None, description='Only {"type": "text"} is supported yet.'
    )


class EmbeddingRequest(Body):
    """Inputs to turn into vectors."""

    model: str | None = Field(
        default=None, description="Null, `tgi` and `dummy` mean the default model."
    )
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either; at most 256."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="`base64` is of little-endian 32-bit floats. Default float."
    )
    dimensions: Any = Field(default=None, description="Not supported: refused.")


class EmbeddingEntry(BaseModel):
    """The vector of one input."""

    object: Literal["embedding"] = Field(description="Always embedding.")
    index: int = Field(description="The input's number, from 0.")
    embedding: list[float] | str = Field(description="A vector of length 1, or its base64.")


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int = Field(description="Tokens of all inputs.")
    total_tokens: int = Field(description="The same.")


class EmbeddingList(BaseModel):
    """One vector for each input."""

    object: Literal["list"] = Field(description="Always list.")
    data: list[EmbeddingEntry] = Field(description="In the order of the inputs.")
    model: str = Field(description="The model that made them.")
    usage: EmbeddingUsage = Field(description="Token counts.")


class PromptDetails(BaseModel):
    """About the prompt's tokens."""

    cached_tokens: int = Field(description="Prompt tokens that had been computed before.")


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int = Field(description="Tokens of all prompts.")
    completion_tokens: int = Field(description="Tokens of all answers.")
    total_tokens: int = Field(description="Their sum.")
    prompt_tokens_details: PromptDetails = Field(description="More about the prompts.")


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

    content: list[TokenLogprob] = Field(description="One for each token, special ones left out.")


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = Field(description="Always assistant.")
    content: str = Field(description="Its text.")


class ChatChoice(BaseModel):
    """One answer."""

    index: int = Field(description="Its number, from 0.")
    message: AnswerMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason = Field(description="Why it ended.")


class ChatCompletion(BaseModel):
    """All answers to a conversation."""

    id: str = Field(description="Unique.")
    object: Literal["chat.completion"] = Field(description="Always chat.completion.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answered.")
    choices: list[ChatChoice] = Field(description="One for each of n.")
    usage: Usage = Field(description="Token counts.")


class Delta(BaseModel):
    """What an event adds to the answer."""

    role: str | None = Field(default=None, description="On the first event of a choice.")
    content: str | None = Field(default=None, description="Text to append.")


class ChunkChoice(BaseModel):
    """A part of one answer."""

    index: int = Field(description="The answer's number, from 0.")
    delta: Delta = Field(description="What it adds.")
    logprobs: ChatLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason | None = Field(description="On the last event of a choice.")


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str = Field(description="The same on all events of a stream.")
    object: Literal["chat.completion.chunk"] = Field(description="Always so.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answers.")
    choices: list[ChunkChoice] = Field(description="One, or none on the usage event.")
    usage: Usage | None = Field(default=None, description="On the usage event.")


class CompletionLogprobs(BaseModel):
    """Log probabilities of an answer, as parallel lists."""

    tokens: list[str] = Field(description="Text of each token.")
    token_logprobs: list[float] = Field(description="Raw natural logs.")
    top_logprobs: list[dict[str, float]] | None = Field(description="Likeliest tokens, by text.")
    text_offset: list[int] = Field(description="Where each starts, in code points.")


class CompletionChoice(BaseModel):
    """One answer, or a part of one in a stream."""

    index: int = Field(description="Its number: all answers to the first prompt come first.")
    text: str = Field(description="Its text.")
    logprobs: CompletionLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason | None = Field(description="Why it ended.")


class Completion(BaseModel):
    """All answers to a list of prompts, or one event of a stream."""

    id: str = Field(description="Unique; the same on all events of a stream.")
    object: Literal["text_completion"] = Field(description="Always text_completion.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answered.")
    choices: list[CompletionChoice] = Field(description="In index order.")
    usage: Usage | None = Field(default=None, description="Token counts.")


class ModelEntry(BaseModel):
    """A model that can be named in a request."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = Field(description="Always model.")
    created: int = Field(description="Start of this router, in seconds since 1970.")
    owned_by: str = Field(description="Its name again, as TGI does.")
    parent: str | None = Field(default=None, description="The model that an adapter changes.")


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = Field(description="Always list.")
    data: list[ModelEntry] = Field(description="The models, the default one first.")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="What to do about it, for a person.")
    type: str = Field(description="Kind of error.")
    param: str | None = Field(description="The field at fault.")
    code: str | None = Field(description="What went wrong, for a program.")


class OpenAIError(BaseModel):
    """A failure on OpenAI's routes."""

    error: ErrorBody = Field(description="What went wrong.")
