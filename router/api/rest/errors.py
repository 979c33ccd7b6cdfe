"""Errors as each REST dialect writes them.

TGI: ``{"error": text, "error_type": tag}``. OpenAI: ``{"error": {message, type, param, code}}``.
Anthropic: ``{"type": "error", "error": {type, message}, "request_id": text}``. They differ in some
statuses, as the clients of OpenAI and Anthropic decide by the status whether to try again.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any, assert_never

import orjson
from starlette.responses import Response
from starlette.types import Scope

from router.api.rest.request_id import REQUEST_ID
from router.errors import Fault, RequestError, TooLongError


class Dialect(Enum):
    """Whose words a route speaks."""

    TGI = "tgi"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class HttpError(RequestError):
    """A fault of the HTTP exchange itself, with its own status.

    400 syntax, 408 a body that does not go on, 415 content type.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(Fault.VALIDATION, message)
        self.status = status


class TooLargeError(RequestError):
    """A body over the limit.

    ``waiting`` says that the client holds it back until it is asked for (``Expect: 100-continue``):
    then the connection is closed, as what comes next on it may be the body or a new request. Else
    it stays open and the server discards what comes, as closing would reset it under the answer.
    """

    def __init__(self, limit: int, *, waiting: bool) -> None:
        super().__init__(Fault.TOO_LARGE, f"the body must have at most {limit} bytes")
        self.waiting = waiting


OPENAI_STATUS = {
    Fault.VALIDATION: 400,
    Fault.UNSUPPORTED: 400,
    Fault.TEMPLATE: 400,
    Fault.WORKER_LOST: 503,
    Fault.ENGINE_FAILED: 500,
}
"""Where OpenAI's status differs from TGI's: its clients retry 429 and 5xx, and nothing else."""

ANTHROPIC_STATUS = {**OPENAI_STATUS, Fault.OVERLOADED: 529}
"""Anthropic's own: 429 is a limit of the client there, and 529 one of the server."""

ANTHROPIC_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Status to type. Other 4xx are invalid requests, other 5xx are ``api_error``."""

OPENAI_CODE = {
    Fault.UNSUPPORTED: "unsupported_parameter",
    Fault.VALIDATION: "invalid_value",
    Fault.UNAUTHENTICATED: "invalid_api_key",
    Fault.OVERLOADED: "rate_limit_exceeded",
}


def status_of(error: RequestError, dialect: Dialect) -> int:
    """Returns the HTTP status of a fault."""
    if isinstance(error, HttpError):
        return error.status
    if dialect is Dialect.OPENAI:
        return OPENAI_STATUS.get(error.fault, error.wire.http)
    if dialect is Dialect.ANTHROPIC:
        return ANTHROPIC_STATUS.get(error.fault, error.wire.http)
    return error.wire.http


def tgi_error(error: RequestError) -> dict[str, Any]:
    """Returns TGI's error object. Clients match on ``error_type``, not on the text."""
    validation = error.wire.tgi == "validation"
    prefix = "Input validation error: " if validation else ""
    return {"error": prefix + error.message, "error_type": error.wire.tgi}


WORDS = {
    "`max_new_tokens`": "`max_tokens`",
    "`inputs`": "`prompt`",
    "`top_n_tokens`": "`top_logprobs`",
}
"""Names that messages of the service use, which are TGI's, and OpenAI's for the same."""


def openai_code(error: RequestError) -> str | None:
    """Returns what programs decide by, beside the status; the HTTP exchange itself has no code."""
    if isinstance(error, TooLongError):
        return "context_length_exceeded"
    if isinstance(error, HttpError):
        return None
    return OPENAI_CODE.get(error.fault, error.fault.value.lower())


def openai_error(error: RequestError) -> dict[str, Any]:
    """Returns OpenAI's error object."""
    message = error.message
    for native, name in WORDS.items():
        message = message.replace(native, name)
    return {
        "error": {
            "message": message,
            "type": error.wire.openai,
            "param": error.field,
            "code": openai_code(error),
        }
    }


ANTHROPIC_WORDS = {
    "`max_new_tokens`": "`max_tokens`",
    "`inputs`": "`messages`",
    "`prompt`": "`messages`",
    "`stop`": "`stop_sequences`",
    ".function.parameters": ".input_schema",
    ".function.name": ".name",
}
"""As ``WORDS``, for Anthropic."""


def anthropic_error(error: RequestError) -> dict[str, Any]:
    """Returns Anthropic's error object, without the request's id."""
    status = status_of(error, Dialect.ANTHROPIC)
    kind = ANTHROPIC_TYPE.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = error.message
    for native, name in ANTHROPIC_WORDS.items():
        message = message.replace(native, name)
    return {"type": "error", "error": {"type": kind, "message": message}}


BODY: dict[Dialect, Callable[[RequestError], dict[str, Any]]] = {
    Dialect.TGI: tgi_error,
    Dialect.OPENAI: openai_error,
    Dialect.ANTHROPIC: anthropic_error,
}


def error_body(error: RequestError, dialect: Dialect, scope: Scope | None = None) -> bytes:
    """Returns what says an error, as JSON. The ``scope`` of the request has its id."""
    body = BODY[dialect](error)
    if dialect is Dialect.ANTHROPIC:
        body["request_id"] = None if scope is None else scope.get(REQUEST_ID)
    return orjson.dumps(body)


def error_response(error: RequestError, dialect: Dialect, scope: Scope | None = None) -> Response:
    """Returns the whole answer for a request that failed before its first byte."""
    headers: dict[str, str] = {}
    if error.wire.retry_after_s is not None:
        headers["retry-after"] = str(error.wire.retry_after_s)
    if error.fault is Fault.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    status = status_of(error, dialect)
    if status == 408 or (isinstance(error, TooLargeError) and error.waiting):
        headers["connection"] = "close"  # what comes next may be the rest of the body
    return Response(
        error_body(error, dialect, scope),
        status,
        headers,
        media_type="application/json",
    )


def error_event(error: RequestError, dialect: Dialect, scope: Scope | None = None) -> bytes:
    """Returns the event that ends a stream which failed after its first byte."""
    body = error_body(error, dialect, scope)
    match dialect:
        case Dialect.TGI:
            return b"data:" + body + b"\n\n"
        case Dialect.OPENAI:
            return b"data: " + body + b"\n\ndata: [DONE]\n\n"
        case Dialect.ANTHROPIC:
            return b"event: error\ndata: " + body + b"\n\n"
        case _:
            assert_never(dialect)


def first_fault(error: BaseException) -> RequestError | None:
    """Returns the RequestError that an exception is, or that a group of them holds, if any."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(first_fault, error.exceptions)), None)
    return None
