"""The tables of docs/anthropic-compatibility.md and our bodies name the same fields.

That Anthropic's SDK has no others is shown where it is installed, in ``tests/heavy/clients``.
"""

import re
from pathlib import Path

from pydantic import BaseModel

from router.api.rest import models_anthropic as m
from router.api.rest.anthropic_asks import ALLOWED

PAGE = Path(__file__).parents[2] / "docs" / "anthropic-compatibility.md"
OUTCOMES = {"honoured", "no effect", "refused", "ignored"}
NESTED: dict[str, type[BaseModel]] = {
    "thinking": m.AnthropicThoughts,
    "output_config": m.AnthropicOutput,
    "tools": m.AnthropicTool,
    "messages": m.AnthropicTurn,
}


def rows() -> dict[str, str]:
    """Outcome by field, of all tables that have outcomes."""
    found = {}
    lines = re.findall(r"^\| (`.+?`) \| ([a-z ]+) \|", PAGE.read_text(), re.MULTILINE)
    for names, outcome in lines:
        for name in re.findall(r"`([\w.]+)`", names):
            found[name] = outcome
    return found


def fields() -> set[str]:
    """The fields of our bodies, and the blocks that messages may have."""
    names = set(m.MessagesRequest.model_fields)
    for name, model in NESTED.items():
        names |= {f"{name}.{field}" for field in model.model_fields}
    blocks = {kind for kinds in ALLOWED.values() for kind in kinds}
    # One row stands for all that an object says, unless it is in several.
    whole = {"thinking", "output_config", "tools.cache_control"}
    return (names - whole) | blocks


def test_every_field_has_a_row() -> None:
    assert fields() - rows().keys() == set()
    assert set(rows().values()) <= OUTCOMES


def test_every_row_that_is_not_ignored_has_a_field() -> None:
    refused = {"image", "document", "search_result"}
    known = {name for name, outcome in rows().items() if outcome != "ignored"}
    assert known - fields() - refused == set()


def test_what_is_ignored_is_no_field_but_for_what_is_said_to_be() -> None:
    ignored = {name for name, outcome in rows().items() if outcome == "ignored"}
    assert ignored & fields() == {"thinking.budget_tokens"}
