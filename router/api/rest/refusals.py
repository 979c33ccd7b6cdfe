"""Fields of OpenAI's requests that nothing here can honour, and the values of them that do no harm.

What a field's chat template or engine cannot do is refused where it is known: in ``chat.py`` and by
the service.
"""

from router.api.rest.asks import unsupported
from router.api.rest.models_chat import ChatRequest
from router.api.rest.models_completions import CompletionRequest

HARMLESS: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "guided_whitespace_pattern": (None,),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "store": (None, False),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
"""Field to the values that ask for nothing. Any other value is refused."""
HARMLESS_WITHIN: dict[str, tuple[str, ...]] = {
    "structured_outputs": ("structural_tag", "whitespace_pattern"),
}
"""Field to what of its object is refused unless it is null."""


def refuse_unsupported(body: ChatRequest | CompletionRequest) -> None:
    """Raises RequestError(UNSUPPORTED) naming the first field that asks for what is not there."""
    for field, harmless in HARMLESS.items():
        if field in body.model_fields_set and getattr(body, field) not in harmless:
            raise unsupported(field)
    for field, names in HARMLESS_WITHIN.items():
        for name in names:
            if getattr(getattr(body, field), name, None) is not None:
                raise unsupported(f"{field}.{name}")
