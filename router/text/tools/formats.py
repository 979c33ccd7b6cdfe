"""How models write tool calls: one row for each format, chosen by what the chat template says.

Sources: the chat templates that the models ship, which show a finished call as the model is to
write it; Llama 3.1's "JSON based tool calling" (github.com/meta-llama/llama-models,
``prompt_format.md``); mistral-common's tokenizers v3 to v13; the Hermes function calling format
(github.com/NousResearch/Hermes-Function-Calling), which Qwen 2.5 and 3 and SmolLM3 share.
"""

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from router.text.tools import tag_calls

_ALPHANUMERIC = string.ascii_letters + string.digits
MISTRAL_ID_CHARS = 9
"""Length of a call's id in the templates of Mistral, which refuse any other."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls.

    ``signs`` are texts of which a chat template of this format has every one, and ``lacks`` those
    of which it has none. ``opener`` is what goes before calls and ``closer`` what goes behind one;
    with ``bare`` calls may stand without, at the start of a line. ``separator`` is what goes
    between two calls. ``key`` is the member that has the arguments. ``listed`` calls form a JSON
    array, ``tagged`` ones are ``name[ARGS]{...}`` and not an object each, ``numbered`` ones have
    ``[CALL_ID]`` and an id before that; ``tags`` are as in ``tag_calls.py``. ``several`` says that
    the model was trained to write more than one call in an answer. ``short_ids`` asks for ids as
    Mistral's.
    """

    name: str
    signs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    opener: str = ""
    closer: str = ""
    bare: bool = False
    separator: str = ""
    key: str = "arguments"
    listed: bool = False
    tagged: bool = False
    numbered: bool = False
    tags: bool = False
    several: bool = True
    short_ids: bool = False

    def new_id(self) -> str:
        """An id for a call, unlike all others."""
        if self.short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(MISTRAL_ID_CHARS))
        return f"call_{secrets.token_hex(12)}"

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls in OpenAI's shape, with arguments as objects, as the model writes them."""
        if self.tagged:
            named = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            return "".join(f"{self.opener}{name}[ARGS]{_json(given)}" for name, given in named)
        if self.tags:
            texts = [tag_calls.written(call["function"]) for call in calls]
            return self.separator.join(f"{self.opener}\n{text}\n{self.closer}" for text in texts)
        texts = [
            _json({"name": call["function"]["name"], self.key: call["function"]["arguments"]})
            for call in calls
        ]
        if self.closer:
            return self.separator.join(f"{self.opener}\n{text}\n{self.closer}" for text in texts)
        listed = self.listed and (len(texts) > 1 or not self.bare)
        text = self.separator.join(texts)
        return ("" if self.bare else self.opener) + (f"[{text}]" if listed else text)

    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens of the model, and must be seen to read its calls."""
        tags = ("[CALL_ID]", "[ARGS]") if self.opener == "[TOOL_CALLS]" else ()
        return tuple(text for text in (self.opener, self.closer, *tags) if text)


PLAIN = ToolFormat("json", bare=True, listed=True, separator=", ")
"""For models that have no format of their own: the prompt tells them of this one."""

_LLAMA = ToolFormat(
    "llama3",
    ("<|python_tag|>",),
    opener="<|python_tag|>",
    bare=True,
    separator="; ",
    key="parameters",
    several=False,
)

FORMATS = (
    ToolFormat(
        "mistral-numbered",
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        opener="[TOOL_CALLS]",
        tagged=True,
        numbered=True,
        short_ids=True,
    ),
    ToolFormat(
        "mistral-tagged",
        ("[TOOL_CALLS]", "[ARGS]"),
        opener="[TOOL_CALLS]",
        tagged=True,
        short_ids=True,
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        opener="[TOOL_CALLS]",
        listed=True,
        separator=", ",
        short_ids=True,
    ),
    ToolFormat(
        "qwen-tags",
        ("<tool_call>", "<function=", "<parameter="),
        opener="<tool_call>",
        closer="</tool_call>",
        separator="\n",
        tags=True,
    ),
    # GLM has the same marker around tags of its own, which are not this format.
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        lacks=("<function=", "<arg_key>"),
        opener="<tool_call>",
        closer="</tool_call>",
        separator="\n",
    ),
    _LLAMA,
    # Llama 3.2 has no tools of its own, so its template has no use for the marker.
    replace(_LLAMA, signs=("<|start_header_id|>", '"parameters"'), lacks=("<function=",)),
)
"""The native formats; the first that fits a template is its own."""


def format_of(template: str | None) -> ToolFormat:
    """The format that a chat template speaks; ``PLAIN`` if it is none of the known ones."""
    if template is None:
        return PLAIN
    for row in FORMATS:
        fits = all(sign in template for sign in row.signs)
        if fits and not any(text in template for text in row.lacks):
            return row
    return PLAIN


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
