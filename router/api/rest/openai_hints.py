"""How much a model should think and say: what of it its chat template can be told."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from router.api.rest.asks import unsupported
from router.api.rest.models_chat import ChatRequest
from router.fleet import ModelCard

SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch between thinking and none."""
_CODE_ENDS = {"{{": "}}", "{%": "%}"}
_CODE = re.compile(r"\{[{%]")
_WORD = re.compile(r"(?<![.\w'\"])[a-zA-Z_]\w*")


def hints_of(body: ChatRequest, model: ModelCard) -> dict[str, Any]:
    """Returns the hints of a request as variables that the model's template reads.

    Raises RequestError if it reads none for a hint, unless that asks for nothing special.
    """
    source = template_of(model)
    variables: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        thinks = body.reasoning_effort != "none"
        known = {"reasoning_effort": body.reasoning_effort, **dict.fromkeys(SWITCHES, thinks)}
        usual = body.reasoning_effort == "medium" if thinks else "think" not in source
        variables |= _readable(known, "reasoning_effort", model, usual=usual)
    if body.verbosity is not None:
        usual = body.verbosity == "medium"
        variables |= _readable({"verbosity": body.verbosity}, "verbosity", model, usual=usual)
    return variables


def _readable(
    known: dict[str, Any], field: str, model: ModelCard, *, usual: bool
) -> dict[str, Any]:
    """The variables that the template reads; there must be one, unless the value is the usual."""
    found = readable(known, model)
    if not found and not usual:
        raise unsupported(field, f"the chat template of {model.id} does not read it; leave it out")
    return found


def readable(known: dict[str, Any], model: ModelCard) -> dict[str, Any]:
    """Returns those of the variables that the model's chat template reads."""
    names = _names(template_of(model))
    return {name: value for name, value in known.items() if name in names}


def template_of(model: ModelCard) -> str:
    """Returns the source of the model's chat template, or nothing if it has none."""
    template = model.tokenizer.chat_template
    return "" if template is None else template.source


@lru_cache(maxsize=64)
def _names(source: str) -> frozenset[str]:
    """The names in a template's code, among which are all the variables that it reads."""
    return frozenset(word for code in _code(source) for word in _WORD.findall(code))


def _code(source: str) -> Iterator[str]:
    """The parts of a template that are not its text. One pass: it may be large, and broken."""
    at = 0
    while opening := _CODE.search(source, at):
        end = source.find(_CODE_ENDS[opening[0]], opening.end())
        if end < 0:
            return
        yield source[opening.end() : end]
        at = end
