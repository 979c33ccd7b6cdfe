"""Bodies and answers of TGI's routes, for checking and for the OpenAPI page.

Field names, defaults and meaning are those of text-generation-inference 3.3 (`/info` and
`/generate` of its OpenAPI document); `min_tokens`-like extras are OpenAI's and not offered here.
docs/tgi-compatibility.md lists what differs, and why.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from router.api.rest.body import Body

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class Grammar(Body):
    """What the answer must match."""

    type: Literal["json", "json_object", "json_schema", "regex", "choice", "grammar"] = Field(
        description="json: a JSON schema. json_object: the same, or without a value any object. "
        "json_schema: a schema with a name. regex: a regular expression. choice: one of several "
        "texts. grammar: Lark or GBNF."
    )
    value: Any = Field(
        default=None,
        description="The schema, as an object or as JSON in a text; for json_schema an object with "
        "`schema` and perhaps `name`; else the expression, the list of texts, or the grammar.",
    )
    json_schema: Any = Field(
        default=None, description="In place of `value`, as OpenAI writes it, for json_schema."
    )


class GenerateParameters(Body):
    """How to draw tokens, when to end, and what to report."""

    best_of: int | None = Field(
        default=None,
        description="Generate this many answers and return the likeliest. Needs sampling.",
    )
    temperature: float | None = Field(
        default=None, description="Divides the logits. Above 0. Setting it turns sampling on."
    )
    repetition_penalty: float | None = Field(
        default=None,
        description="Divides the logits of tokens already generated. Above 0; 1.0 is off.",
    )
    frequency_penalty: float | None = Field(
        default=None,
        description="Subtracted per earlier occurrence of a token. In [-2, 2]; 0 is off.",
    )
    top_k: int | None = Field(default=None, description="Keep the k likeliest tokens. At least 1.")
    top_p: float | None = Field(
        default=None, description="Keep the smallest set that reaches this probability. In (0, 1]."
    )
    typical_p: float | None = Field(
        default=None, description="Locally typical sampling. In (0, 1]; 1.0 is off."
    )
    do_sample: bool = Field(
        default=False,
        description="Draw tokens at random rather than take the likeliest. False when `parameters` "
        "is given, true when it is not.",
    )
    max_new_tokens: int | None = Field(
        default=None, description="Tokens to generate at most. Unset: as many as fit."
    )
    return_full_text: bool | None = Field(
        default=None,
        description="Put the prompt in front of the answer. Default true on `POST /` only.",
    )
    stop: list[str] = Field(
        default=[], description="The answer ends where one of these appears; the stop text is kept."
    )
    truncate: int | None = Field(
        default=None, description="Keep only the last so many prompt tokens."
    )
    watermark: bool = Field(
        default=False, description="Mark the text, so that it can be recognised later."
    )
    details: bool = Field(default=False, description="Report tokens, finish reason and counts.")
    decoder_input_details: bool = Field(
        default=False,
        description="Report the prompt's tokens, and with them all details. Not in streams.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**64, description="Equal seeds give equal answers. Unset: drawn."
    )
    top_n_tokens: int | None = Field(
        default=None, ge=0, description="Report so many of the likeliest tokens at each position."
    )
    grammar: Grammar | None = Field(default=None, description="What the answer must match.")
    adapter_id: str | None = Field(
        default=None, description="LoRA adapter to compute with; an unknown one is refused."
    )


class GenerateRequest(Body):
    """A prompt to continue."""

    inputs: str = Field(description="The prompt. Not empty.")
    parameters: GenerateParameters | None = Field(
        default=None, description="Unset: sample with defaults."
    )
    model: str | None = Field(
        default=None,
        description="One of several models behind this router. Unset, `tgi`, `dummy` or a URL: the "
        "default one.",
    )


class CompatGenerateRequest(GenerateRequest):
    """A prompt to continue, as sent to ``POST /``."""

    stream: bool = Field(default=False, description="Answer with server-sent events.")


class VertexRequest(Body):
    """Prompts and conversations, as Vertex AI sends them."""

    instances: list[dict[str, Any]] = Field(
        description="Each an object with `inputs` and perhaps `parameters`, or a conversation as "
        "/v1/chat/completions takes it."
    )


class VertexResponse(BaseModel):
    """The answers, in the order of the instances."""

    predictions: list[str] = Field(description="The text of each answer.")


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int = Field(description="Token id.")
    text: str = Field(description="Text of the token.")
    logprob: float | None = Field(description="Natural log of its probability; null for the first.")


class Token(BaseModel):
    """A generated token."""

    id: int = Field(description="Token id.")
    text: str = Field(description="What it adds to the text; empty inside a character.")
    logprob: float | None = Field(description="Raw natural log of its probability.")
    special: bool = Field(description="Whether it is left out of generated_text.")


class BestOfSequence(BaseModel):
    """One of the answers that `best_of` did not choose."""

    generated_text: str = Field(description="Its text.")
    finish_reason: FinishReason = Field(description="Why it ended.")
    generated_tokens: int = Field(description="Its length in tokens.")
    seed: int | None = Field(description="Its seed; null when greedy.")
    prefill: list[PrefillToken] = Field(description="Only with decoder_input_details.")
    tokens: list[Token] = Field(description="Its tokens.")
    top_tokens: list[list[Token]] = Field(default=[], description="Only with top_n_tokens.")


class Details(BaseModel):
    """What came of a generation."""

    finish_reason: FinishReason = Field(description="Why it ended.")
    generated_tokens: int = Field(description="Number of generated tokens.")
    seed: int | None = Field(description="The seed in use; null when greedy.")
    prefill: list[PrefillToken] = Field(description="Only with decoder_input_details.")
    tokens: list[Token] = Field(description="The generated tokens.")
    top_tokens: list[list[Token]] | None = Field(
        default=None, description="Only with top_n_tokens."
    )
    best_of_sequences: list[BestOfSequence] | None = Field(
        default=None, description="Only with best_of > 1."
    )


class GenerateResponse(BaseModel):
    """A whole answer."""

    generated_text: str = Field(description="The answer, without special tokens.")
    details: Details | None = Field(default=None, description="Only if asked for.")


class StreamDetails(BaseModel):
    """Details on the last event of a stream."""

    finish_reason: FinishReason = Field(description="Why it ended.")
    generated_tokens: int = Field(description="Number of generated tokens.")
    seed: int | None = Field(description="The seed in use; null when greedy.")
    input_length: int = Field(description="Prompt tokens.")


class StreamResponse(BaseModel):
    """One event of a stream: ``data:{...}``."""

    index: int = Field(description="Counts tokens, from 1.")
    token: Token = Field(description="The token.")
    top_tokens: list[Token] | None = Field(default=None, description="Only with top_n_tokens.")
    generated_text: str | None = Field(description="On the last event, the whole answer.")
    details: StreamDetails | None = Field(description="On the last event, if asked for.")


class SimpleToken(BaseModel):
    """A token of a tokenised text."""

    id: int = Field(description="Token id.")
    text: str = Field(description="The piece of the input.")
    start: int = Field(description="First byte of the piece in the input's UTF-8.")
    stop: int = Field(description="One behind its last byte.")


class ChatTokenizeResponse(BaseModel):
    """A conversation as the model reads it."""

    tokenize_response: list[SimpleToken] = Field(description="Its tokens.")
    templated_text: str = Field(description="The text the chat template made of it.")


class Info(BaseModel):
    """The default model and the limits of this router."""

    model_id: str = Field(description="The default model.")
    model_sha: str | None = Field(description="Always null.")
    model_pipeline_tag: str | None = Field(description="Always text-generation.")
    max_concurrent_requests: int = Field(description="Requests held at once.")
    max_best_of: int = Field(description="Largest best_of.")
    max_stop_sequences: int = Field(description="Largest number of stop strings.")
    max_input_tokens: int = Field(description="Longest prompt, in tokens.")
    max_total_tokens: int = Field(description="Longest prompt and answer together, in tokens.")
    validation_workers: int = Field(description="Always 1.")
    max_client_batch_size: int = Field(description="Most prompts in one /v1/completions body.")
    router: str = Field(description="Name of this software.")
    version: str = Field(description="Its version.")
    sha: str | None = Field(description="Always null.")
    docker_label: str | None = Field(description="Always null.")


class ErrorResponse(BaseModel):
    """A failure on TGI's routes."""

    error: str = Field(description="What went wrong and what to do, for a person.")
    error_type: str = Field(description="What went wrong, for a program.")
