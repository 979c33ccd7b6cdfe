"""What the bodies and answers of OpenAI's routes have in common, and those of `/v1/models`.

Bodies are checked against these models, and the OpenAPI page is made of them. What becomes of each
field is listed in ``docs/openai-compatibility.md``. Fields that are not there are ignored, and
named in ``x-ignored-parameters``.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from router.api.rest.body import Body

ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
CacheRetention = Literal["in_memory", "in-memory", "24h"]
ABSENT = "Refused unless it is null: nothing here does that."


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = Field(
        default=None,
        description="Send the usage in one more event at the end; on all others it is null.",
    )
    include_obfuscation: bool | None = Field(
        default=None, description="Accepted without effect: nothing is padded."
    )


class JsonSchemaFormat(Body):
    """A JSON schema with its name."""

    name: str | None = Field(default=None, description="For logs and error messages.")
    description: str | None = Field(default=None, description="Accepted without effect.")
    definition: dict[str, Any] | bool | None = Field(
        default=None, alias="schema", description="The schema. Unset: any JSON object."
    )
    strict: bool | None = Field(
        default=None, description="Accepted without effect: answers always follow the schema."
    )


class ResponseFormat(Body):
    """What the text of an answer must be: OpenAI's shapes, and those of TGI."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"] = Field(
        description="`json` is TGI's json_schema; `regex` and `grammar` are further kinds."
    )
    json_schema: JsonSchemaFormat | None = Field(default=None, description="With json_schema.")
    definition: dict[str, Any] | bool | None = Field(
        default=None, alias="schema", description="A JSON schema, with json_object."
    )
    value: Any = Field(
        default=None, description="TGI's: a JSON schema, or the text of a regular expression."
    )
    grammar: str | None = Field(default=None, description="Lark or GBNF, with grammar.")


class StructuredOutputs(Body):
    """vLLM's way to ask for a constraint; only one of the fields may be set."""

    schema_or_text: dict[str, Any] | bool | str | None = Field(
        default=None, alias="json", description="A JSON schema, or its text."
    )
    regex: str | None = Field(default=None, description="A regular expression.")
    choice: list[str] | None = Field(default=None, description="The texts to choose from.")
    grammar: str | None = Field(default=None, description="A grammar in Lark or GBNF.")
    json_object: bool | None = Field(default=None, description="Any JSON object.")
    structural_tag: Any = Field(default=None, description=ABSENT)
    whitespace_pattern: Any = Field(default=None, description=ABSENT)


class SamplingFields(Body):
    """What both routes share: how to draw tokens, when to end, what to report."""

    model: str | None = Field(
        default=None,
        description="A model, or a LoRA adapter of one. Null, `tgi`, `dummy` and a URL mean the "
        "default one.",
    )
    temperature: float | None = Field(
        default=None, description="In [0, 100]. 0 is greedy. Default 1."
    )
    top_p: float | None = Field(
        default=None, description="In [0, 1]. 1 is off, 0 leaves the likeliest token."
    )
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
    n: int | None = Field(default=None, ge=1, description="Number of answers. Default 1.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    logit_bias: dict[str, float] | None = Field(
        default=None, description="Token id to what is added to its logit, in [-100, 100]."
    )
    max_tokens: int | None = Field(
        default=None, description="Tokens to generate at most. Unset: as many as fit."
    )
    service_tier: ServiceTier | None = Field(
        default=None,
        description="`priority` and `fast` go before, `flex` after all others. The answer says it.",
    )
    user: str | None = Field(default=None, description="Accepted without effect.")
    response_format: ResponseFormat | None = Field(
        default=None, description="What the text of the answer must be."
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
    include_stop_str_in_output: bool | None = Field(
        default=None, description="Keep what ended the answer in its text. Default false."
    )
    skip_special_tokens: bool | None = Field(
        default=None, description="Leave special tokens out of the text. Default true."
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Report the log probabilities of the prompt's tokens, and of so many likeliest "
        "at each position. Not in streams.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="What the text of the answer must be, as vLLM's clients say it."
    )
    guided_json: dict[str, Any] | bool | str | None = Field(
        default=None, description="A JSON schema, or its text."
    )
    guided_regex: str | None = Field(default=None, description="A regular expression.")
    guided_choice: list[str] | None = Field(default=None, description="The texts to choose from.")
    guided_grammar: str | None = Field(default=None, description="A grammar in Lark or GBNF.")
    guided_whitespace_pattern: Any = Field(default=None, description=ABSENT)
    use_beam_search: Any = Field(default=None, description="Refused unless it is null or false.")
    return_token_ids: bool | None = Field(
        default=None,
        description="vLLM's: report the ids of the prompt's tokens and of the generated ones.",
    )


class PromptDetails(BaseModel):
    """About the prompt's tokens."""

    cached_tokens: int = Field(description="Prompt tokens that had been computed before.")


class CompletionDetails(BaseModel):
    """About the answers' tokens."""

    reasoning_tokens: int = Field(description="Tokens of thoughts, which are among the answers'.")


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int = Field(description="Tokens of all prompts.")
    completion_tokens: int = Field(description="Tokens of all answers.")
    total_tokens: int = Field(description="Their sum.")
    prompt_tokens_details: PromptDetails = Field(description="More about the prompts.")
    completion_tokens_details: CompletionDetails | None = Field(
        default=None, description="More about the answers of chats."
    )


class PromptLogprob(BaseModel):
    """One token at a position of a prompt, in vLLM's shape."""

    logprob: float = Field(description="Raw natural log; -9999.0 stands for minus infinity.")
    rank: int = Field(description="1 is the likeliest of the whole vocabulary.")
    decoded_token: str = Field(description="Its text.")


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt but the first: its id and the likeliest ones', and what is said of
each."""


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
