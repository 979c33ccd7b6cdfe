"""Errors on gRPC: a status code, a text, and ``google.rpc.Status`` details for programs."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn

import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from router.errors import Fault, RequestError

logger = logging.getLogger(__name__)

DOMAIN = "roundhouse"
DETAILS_KEY = "grpc-status-details-bin"
TEXT_MAX = 2000
"""Plain characters of a message: trailers over 8 KB are refused by many clients."""


def status_of(error: RequestError) -> status_pb2.Status:
    """Returns the rich status: ErrorInfo, BadRequest for a field at fault, RetryInfo if useful."""
    text = clipped(error.message)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.fault.value, domain=DOMAIN)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.wire.retry_after_s is not None:
        delay = Duration(seconds=error.wire.retry_after_s)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return rich_status(_code(error), text, details)


def rich_status(code: grpc.StatusCode, text: str, details: Iterable[Message]) -> status_pb2.Status:
    """Returns a status with details for programs."""
    status = status_pb2.Status(code=code.value[0], message=clipped(text))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def clipped(text: str) -> str:
    """Returns as much of a text as fits into the trailers of a call.

    They have it three times: escaped, where all but plain letters take 3 bytes for each of theirs,
    and twice in base64. So a byte of plain letters takes 11 thirds, and one of others 17.
    """
    text = text[:TEXT_MAX]
    if text.isascii() and text.isprintable() and "%" not in text:
        return text
    left = 11 * TEXT_MAX
    for place, letter in enumerate(text):
        plain = " " <= letter <= "~" and letter != "%"
        left -= 11 if plain else 17 * len(letter.encode(errors="replace"))
        if left < 0:
            return text[:place]
    return text


def _code(error: RequestError) -> grpc.StatusCode:
    return grpc.StatusCode[error.wire.grpc]


@contextmanager
def renaming(
    name: Callable[[str], str], words: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Errors that come from inside name the field at fault as this protocol's clients know it.

    ``words`` are names in their messages, which are TGI's, and what stands for them here.
    """
    try:
        yield
    except (RequestError, ExceptionGroup) as error:
        first = first_of(error)
        if not isinstance(first, RequestError) or first.field is None:
            raise
        message = first.message
        for native, word in words.items():
            message = message.replace(native, word)
        renamed = RequestError(first.fault, message, name(first.field))
        renamed.counted = first.counted
        raise renamed from error


def first_of(error: Exception) -> Exception:
    """Returns the first of several failures at once, or the failure itself."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def known_fault(error: Exception) -> RequestError:
    """Returns what to tell the client: of several failures at once, the first.

    Anything but a RequestError is a bug: logged, and told as INTERNAL.
    """
    error = first_of(error)
    if isinstance(error, RequestError):
        return error
    logger.error("call failed", exc_info=error)
    return RequestError(Fault.INTERNAL, "the router failed; its log says why")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the call with the status of an error."""
    fault = known_fault(error)
    await abort_with(context, _code(fault), status_of(fault))


async def abort_with(
    context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, status: status_pb2.Status
) -> NoReturn:
    """Ends the call with a status."""
    trailers = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(code, status.message, trailers)
    raise AssertionError("abort raises")
