"""Reading a request body: bounded bytes, strict JSON, a checked model, and what was not known."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from starlette.requests import Request
from starlette.types import Message

from router.api.rest.errors import HttpError, TooLargeError
from router.api.rest.presence import ClientLeft
from router.errors import Fault, RequestError

BODY_PAUSE_S = 60.0
"""The longest wait for a next part of a body. One that is never completed would hold its connection
for ever."""
IGNORED_NAMES_MAX = 32
IGNORED_NAME_LENGTH = 64


def _fail_fast(schema: Any) -> None:
    """Has every list within be checked up to its first fault."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Checked(BaseModel):
    """Base of what clients send: of a list only the first wrong entry is told.

    A body may have a million of them, and to list them all takes seconds in which nothing else
    runs.
    """

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler, /
    ) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Body(Checked):
    """Base of request bodies: no conversion between types, no NaN, unknown fields kept apart."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


B = TypeVar("B", bound=Body)


async def read_body(request: Request, limit: int) -> bytes:
    """Reads a body of at most ``limit`` bytes.

    Raises TooLargeError as soon as it is known to be longer, ClientLeft if it breaks off, HttpError
    408 if it does not go on.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise TooLargeError(limit, waiting="expect" in request.headers)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await _next_part(request)
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise TooLargeError(limit, waiting=False)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _next_part(request: Request) -> Message:
    try:
        async with asyncio.timeout(BODY_PAUSE_S):
            return await request.receive()
    except TimeoutError:
        text = f"the body is not complete, and nothing of it came for {BODY_PAUSE_S:g} s"
        raise HttpError(408, text) from None


async def parse(request: Request, model: type[B], limit: int) -> B:
    """Reads and checks the body of a request.

    Raises as ``read_json`` does, and RequestError(VALIDATION) naming the first field at fault.
    """
    _, value = await read_json(request, limit)
    return check(value, model)


async def read_json(request: Request, limit: int) -> tuple[bytes, Any]:
    """Reads the body of a request; returns it as it came, and what it says.

    Raises HttpError 400 for bytes that are not JSON (which NaN, Infinity, lone surrogates and
    invalid UTF-8 are not), 415 for another content type, and as ``read_body`` does.
    """
    headers = request.headers
    media = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise HttpError(415, "send the body as `Content-Type: application/json`")
    raw = await read_body(request, limit)
    try:
        return raw, orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise HttpError(400, f"the body is not valid JSON: {error}") from None


def check(value: Any, model: type[B]) -> B:
    """Checks a parsed body. Raises RequestError(VALIDATION) naming the first field at fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Members of a union are part of the location, in the form of type names; leave these out.
        path = [part for part in first["loc"] if not _is_union_member(part)]
        field = ".".join(str(part)[:IGNORED_NAME_LENGTH] for part in path)
        message = f"`{field}`: {first['msg']}" if field else f"body: {first['msg']}"
        raise RequestError(Fault.VALIDATION, message, field or None) from None


def _is_union_member(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float"))


def unknown_fields(body: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yields the names of fields the body has and its model does not, nested ones with dots."""
    for name in body.model_extra or ():
        yield prefix + name
    for name in body.model_fields_set:
        value = body.__dict__.get(name)
        if isinstance(value, Body):
            yield from unknown_fields(value, f"{prefix}{name}.")


def ignored_header(body: Body, *more: str) -> dict[str, str]:
    """Returns the ``x-ignored-parameters`` header, or nothing if every field is known.

    ``more`` are known fields that have no effect this time.

    Names are the client's own text: cut to a safe alphabet and length, and at most
    IGNORED_NAMES_MAX of them.
    """
    names = sorted((*unknown_fields(body), *more))
    if not names:
        return {}
    safe = [
        re.sub(r"[^A-Za-z0-9_.\-]", "_", name[:IGNORED_NAME_LENGTH])
        for name in names[:IGNORED_NAMES_MAX]
    ]
    return {"x-ignored-parameters": ",".join(safe)}
