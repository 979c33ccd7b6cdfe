"""Fields of OpenAI's requests that would change the answer and are not there yet."""

from router.api.rest.asks import unsupported
from router.api.rest.models_openai import ChatRequest, CompletionRequest

HARMLESS: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "prompt_logprobs": (None,),
    "use_beam_search": (None, False),
}
"""Field to the values that ask for nothing. Any other value is refused."""


def refuse_unsupported(body: ChatRequest | CompletionRequest) -> None:
    """Raises RequestError(UNSUPPORTED) naming the first field that asks for what is not there."""
    for field, harmless in HARMLESS.items():
        if field in body.model_fields_set and getattr(body, field) not in harmless:
            raise unsupported(field)
    if isinstance(body, CompletionRequest) and body.best_of not in (None, body.n or 1):
        raise unsupported("best_of")
