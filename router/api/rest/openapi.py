"""The OpenAPI document and a page that shows it without help from other hosts."""

from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"

Json = dict[str, Any]


def request_body(*models: type[BaseModel]) -> Json:
    """Returns the part of an operation that says what its body is: one of these.

    Routes read their bodies themselves, bounded and strictly, so FastAPI has to be told.
    """
    refs: list[Json] = [{"$ref": REF.format(model=model.__name__)} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body}


def stream_answer(*models: type[BaseModel]) -> Json:
    """Returns the description of a stream whose events are of one of these models, or errors.

    As OpenAPI 3.2 writes it, which 3.1 has no words for: ``itemSchema`` is about one event, whose
    ``data`` is text that holds JSON. OpenAI's streams end with ``[DONE]``.
    """
    refs = [{"$ref": REF.format(model=model.__name__)} for model in models]
    failed = {"type": "object", "required": ["error"]}
    held = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [*refs, failed]}}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, held]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        # The page shows what a reader wants to know: the objects within.
        "content": {"text/event-stream": {"itemSchema": event, "x-event": {"anyOf": refs}}},
        "description": "The answer. Streams are server-sent events.",
    }


def error_answers(model: type[BaseModel], *statuses: int) -> dict[int | str, Json]:
    """Returns the descriptions of error answers."""
    return {status: {"model": model} for status in statuses}


def install_openapi(app: FastAPI, models: Sequence[type[BaseModel]]) -> None:
    """Makes ``app.openapi()`` include models that routes refer to but FastAPI does not see."""

    def build() -> Json:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_schemas(models))
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _schemas(models: Sequence[type[BaseModel]]) -> Json:
    """Returns the JSON schemas of the models and of all that they are made of, by name."""
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    schemas: Json = found.get("$defs", {})
    return schemas


def docs_page(document: Json) -> str:
    """Returns one HTML page with every route and every field: no script, no other host."""
    parts = [
        _operation(path, verb, operation)
        for path, methods in document["paths"].items()
        for verb, operation in methods.items()
    ]
    parts.append("<h2>Objects</h2>")
    schemas = document.get("components", {}).get("schemas", {})
    parts += [_object(name, schema) for name, schema in sorted(schemas.items())]
    title = escape(document["info"]["title"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        "<style>body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .6rem;"
        "text-align:left;vertical-align:top}summary{cursor:pointer}code{background:#f3f3f3}</style>"
        f"<h1>{title} {escape(document['info']['version'])}</h1>"
        f"<p>{escape(document['info'].get('description', ''))} "
        "<a href='openapi.json'>openapi.json</a></p>" + "".join(parts)
    )


def _operation(path: str, verb: str, operation: Json) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    body = "".join(f"<p>Body: {_kind(media['schema'])}</p>" for media in content.values())
    rows = "".join(
        f"<tr><td>{escape(status)}<td>{_answer(answer)}"
        for status, answer in operation.get("responses", {}).items()
    )
    text = escape(operation.get("description", ""))
    return (
        f"<details open><summary><code>{verb.upper()} {escape(path)}</code> {text}</summary>"
        f"{body}<table><tr><th>Status<th>Answer{rows}</table></details>"
    )


def _answer(answer: Json) -> str:
    kinds = [
        f"{escape(media)}: {_kind(holder.get('schema') or holder['x-event'])}"
        for media, holder in answer.get("content", {}).items()
        if holder.get("schema") or "x-event" in holder
    ]
    return "<br>".join(kinds) or escape(answer.get("description", ""))


def _object(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' *' if field in required else ''}"
        f"<td>{_kind(about)}<td>{escape(about.get('description', ''))}"
        for field, about in schema.get("properties", {}).items()
    )
    return (
        f"<h3 id='{escape(name)}'>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>"
        f"<table><tr><th>Field (* required)<th>Type<th>Meaning{rows}</table>"
    )


def _kind(schema: Json) -> str:
    """Returns a type in words, with links to the objects."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return escape(", ".join(map(str, schema["enum"])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return escape(str(schema.get("type", schema.get("const", "any"))))
