"""Bodies and answers of OpenAI's completions and embeddings."""

from typing import Literal

from pydantic import BaseModel, Field

from router.api.rest.body import Body
from router.api.rest.models_openai import ABSENT, PromptLogprobs, SamplingFields, Usage

FinishReason = Literal["stop", "length"]


class CompletionRequest(SamplingFields):
    """Prompts to continue."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Report log probabilities, and of so many likeliest tokens. OpenAI's limit is "
        "5.",
    )
    echo: bool | None = Field(
        default=None,
        description="Put the prompt in front of the answer, with `logprobs` also what there is to "
        "say of its tokens. With max_tokens 0 the prompt alone.",
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        description="Make so many answers and return the n with the highest mean log probability. "
        "More than n not in streams.",
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Begin a prompt of text as the tokenizer does. Default true."
    )
    suffix: str | None = Field(default=None, description=ABSENT)


class CompletionLogprobs(BaseModel):
    """Log probabilities of an answer, as parallel lists."""

    tokens: list[str] = Field(description="Text of each token, special ones too.")
    token_logprobs: list[float | None] = Field(
        description="Raw natural logs; null for the first token of a prompt."
    )
    top_logprobs: list[dict[str, float] | None] | None = Field(
        description="The likeliest tokens by text, and the token itself."
    )
    text_offset: list[int] = Field(description="Where each starts, in code points.")


class CompletionChoice(BaseModel):
    """One answer, or a part of one in a stream."""

    index: int = Field(description="Its number: all answers to the first prompt come first.")
    text: str = Field(description="Its text.")
    logprobs: CompletionLogprobs | None = Field(description="If asked for.")
    finish_reason: FinishReason | None = Field(description="Why it ended.")
    prompt_logprobs: PromptLogprobs | None = Field(default=None, description="If asked for.")
    token_ids: list[int] | None = Field(
        default=None, description="The ids of its tokens, with return_token_ids."
    )
    prompt_token_ids: list[int] | None = Field(
        default=None, description="Those of its prompt; in streams on its first event."
    )


class Completion(BaseModel):
    """All answers to a list of prompts, or one event of a stream."""

    id: str = Field(description="Unique; the same on all events of a stream.")
    object: Literal["text_completion"] = Field(description="Always text_completion.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answered.")
    system_fingerprint: str = Field(description="Changes with what computes the answers.")
    service_tier: Literal["default", "flex", "priority"] | None = Field(
        default=None, description="What was used, if the request had one."
    )
    choices: list[CompletionChoice] = Field(description="In index order.")
    usage: Usage | None = Field(default=None, description="Token counts.")


class EmbeddingRequest(Body):
    """Inputs to turn into vectors."""

    model: str | None = Field(
        default=None,
        description="A model. Null, `tgi`, `dummy` and a URL mean the default one.",
    )
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text, token ids, or a list of either; at most 2048."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="`base64` is of little-endian 32-bit floats. Default float."
    )
    dimensions: int | None = Field(
        default=None,
        description="Refused unless it is what the model's vectors have: they cannot be cut.",
    )
    user: str | None = Field(default=None, description="Accepted without effect.")


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
