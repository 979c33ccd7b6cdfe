"""The tables of docs/openai-compatibility.md, OpenAI's SDK and our bodies name the same fields."""

import re
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel
from typing_extensions import is_typeddict

from router.api.rest.models_chat import ChatRequest
from router.api.rest.models_completions import CompletionRequest, EmbeddingRequest
from router.api.rest.refusals import HARMLESS

PAGE = Path(__file__).parents[2] / "docs" / "openai-compatibility.md"
OUTCOMES = {"honoured", "no effect", "refused"}
BOTH = "Both generating routes"
ROUTES: list[tuple[Any, type[BaseModel], tuple[str, ...]]] = [
    (
        chat_params.CompletionCreateParamsNonStreaming,
        ChatRequest,
        (BOTH, "Chat completions", "Messages", "Tools"),
    ),
    (
        completion_create_params.CompletionCreateParamsNonStreaming,
        CompletionRequest,
        (BOTH, "Completions"),
    ),
    (embedding_create_params.EmbeddingCreateParams, EmbeddingRequest, ("Embeddings",)),
]
NESTED = ("stream_options", "messages", "tools", "tools.function")
"""Objects whose fields have rows of their own. `response_format` has its own kind of table."""


@cache
def rows() -> dict[str, dict[str, str]]:
    """Outcome by field, for each part of the page that has a table of fields."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^##+ ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        for names, outcome in re.findall(r"^\| (`.+?`) \| ([a-z ]+) \|", text, re.MULTILINE):
            for name in re.findall(r"`([\w.]+)`", names):
                found.setdefault(title, {})[name] = outcome
    return found


def documented(parts: tuple[str, ...]) -> dict[str, str]:
    return {name: outcome for part in parts for name, outcome in rows()[part].items()}


def fields_within(hint: Any, prefix: str) -> set[str]:
    """The fields of all typed dictionaries that a hint of the SDK allows."""
    if not is_typeddict(hint):
        return {name for part in get_args(hint) for name in fields_within(part, prefix)}
    names = set()
    for name, inner in get_type_hints(hint).items():
        names.add(f"{prefix}{name}")
        if f"{prefix}{name}" in NESTED:
            names |= fields_within(inner, f"{prefix}{name}.")
    return names


def model_fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    """The fields of our body, in the same form."""
    names = set()
    for name, field in model.model_fields.items():
        names.add(f"{prefix}{name}")
        if f"{prefix}{name}" in NESTED:
            for inner in models_in(field.annotation):
                names |= model_fields(inner, f"{prefix}{name}.")
    return names


def models_in(hint: Any) -> list[type[BaseModel]]:
    if get_origin(hint) in (Union, UnionType, list):
        return [model for part in get_args(hint) for model in models_in(part)]
    return [hint] if isinstance(hint, type) and issubclass(hint, BaseModel) else []


@pytest.mark.parametrize(("params", "model", "parts"), ROUTES)
def test_reference_page_and_bodies_have_the_same_fields(
    params: Any, model: type[BaseModel], parts: tuple[str, ...]
) -> None:
    reference, listed = fields_within(params, ""), documented(parts).keys()
    assert len(reference) >= 5
    # Objects whose fields have the rows; custom tools are refused by their type, and `arguments`
    # is TGI's other name for the parameters.
    held = {"tools.function", "tools.custom"}
    assert reference - held - listed == set()
    assert model_fields(model) - held - {"tools.function.arguments"} == listed


def test_outcomes_are_as_they_are_said_to_be() -> None:
    table = documented(ROUTES[0][2]) | documented(ROUTES[1][2])
    assert set(table.values()) == OUTCOMES
    refused = {name for name, outcome in table.items() if outcome == "refused"}
    assert refused == HARMLESS.keys() | {"messages.audio"}
