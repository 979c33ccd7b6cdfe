"""Errors as each REST dialect writes them.

TGI: ``{"error": text, "error_type": tag}``. OpenAI: ``{"error": {message, type, param, code}}``.
The two differ in some statuses, as OpenAI's clients decide by the status whether to try again.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import orjson
from starlette.responses import Response

from router.errors import Fault, RequestError, TooLongError


class Dialect(Enum):
    """Whose words a route speaks."""

    TGI = "tgi"
    OPENAI = "openai"


class HttpError(RequestError):
    """A fault of the HTTP exchange itself, with its own status: 400 syntax, 415 content type."""

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


BODY: dict[Dialect, Callable[[RequestError], dict[str, Any]]] = {
    Dialect.TGI: tgi_error,
    Dialect.OPENAI: openai_error,
}


def error_response(error: RequestError, dialect: Dialect) -> Response:
    """Returns the whole answer for a request that failed before its first byte."""
    headers: dict[str, str] = {}
    if error.wire.retry_after_s is not None:
        headers["retry-after"] = str(error.wire.retry_after_s)
    if error.fault is Fault.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, TooLargeError) and error.waiting:
        headers["connection"] = "close"
    return Response(
        orjson.dumps(BODY[dialect](error)),
        status_of(error, dialect),
        headers,
        media_type="application/json",
    )


def error_event(error: RequestError, dialect: Dialect) -> bytes:
    """Returns the event that ends a stream which failed after its first byte."""
    body = orjson.dumps(BODY[dialect](error))
    if dialect is Dialect.TGI:
        return b"data:" + body + b"\n\n"
    return b"data: " + body + b"\n\ndata: [DONE]\n\n"


def first_fault(error: BaseException) -> RequestError | None:
    """Returns the RequestError that an exception is, or that a group of them holds, if any."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(first_fault, error.exceptions)), None)
    return None
