"""What the gRPC services have in common: parsers, the key, deadlines, failures as statuses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from router.api.grpc_errors import abort, first_of
from router.auth import ApiKeys
from router.errors import Fault, RequestError
from router.journal import name_request

UNARY = grpc.unary_unary_rpc_method_handler
STREAM = grpc.unary_stream_rpc_method_handler
BOTH_WAYS = grpc.stream_stream_rpc_method_handler

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
M = TypeVar("M", bound=Message)
Received: TypeAlias = M | RequestError | None
"""What a parser makes of a request."""


def decoder(kind: type[M], bytes_max: int | None = None) -> Callable[[bytes], Received[M]]:
    """Returns a parser that gives None for bytes that are no such message, or the fault.

    grpcio answers a parser that raises with INTERNAL; the caller can say INVALID_ARGUMENT. And its
    limit of a message's size is one for all services of a port.
    """

    def decode(data: bytes) -> Received[M]:
        if bytes_max is not None and len(data) > bytes_max:
            text = f"the message may have up to {bytes_max} bytes. Given: {len(data)}"
            return RequestError(Fault.TOO_LARGE, text)
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return decode


def handler(
    make: Callable[..., Handler],
    method: Callable[[Any, Context], Any],
    request: type[Message],
    response: type[Message],
    bytes_max: int | None = None,
) -> Handler:
    """Returns a method as the generated code would, but for the forgiving parser.

    ``bytes_max`` is the size of a request at most, in bytes.
    """
    return make(
        method,
        request_deserializer=decoder(request, bytes_max),
        response_serializer=response.SerializeToString,
    )


def understood(request: Received[M]) -> M:
    """Returns what the parser found. Raises RequestError if that is nothing, or a fault."""
    if isinstance(request, RequestError):
        raise request
    if request is None:
        raise RequestError(Fault.VALIDATION, "the request is not a message of this method")
    return request


def check_key(keys: ApiKeys, context: Context) -> None:
    """Checks the call's ``authorization`` metadata. Raises RequestError, UNAUTHENTICATED."""
    keys.check(dict(context.invocation_metadata() or ()).get("authorization"))


@asynccontextmanager
async def failing_well(context: Context) -> AsyncIterator[None]:
    """Whatever goes wrong inside becomes the status of the call; of several faults, the first.

    What the log says of requests inside has the name in the call's ``x-request-id``, or a new one.
    """
    name_request(str(dict(context.invocation_metadata() or ()).get("x-request-id", "")))
    try:
        yield
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception as error:  # noqa: BLE001 -- logged, and answered as INTERNAL
        # grpcio's own errors say that a message could not be sent: the client has left, and a task
        # beside the handler's own has seen it first.
        if not isinstance(first_of(error), grpc.aio.BaseError):
            await abort(context, error)


@asynccontextmanager
async def guarded(
    keys: ApiKeys,
    request: Received[M],
    context: Context,
    refused: Callable[[RequestError], None] | None = None,
) -> AsyncIterator[M]:
    """Checks key and request, and yields the request; failures as ``failing_well`` says.

    ``refused`` is told what goes wrong with a request that is known: it counts what the service has
    not counted. Methods that generate nothing leave it out, as on REST.
    """
    async with failing_well(context):
        check_key(keys, context)
        known = understood(request)
        try:
            yield known
        except Exception as error:
            fault = first_of(error)
            if refused is not None and isinstance(fault, RequestError):
                refused(fault)
            raise


@asynccontextmanager
async def opened(request: Received[M], context: Context) -> AsyncIterator[M]:
    """As ``guarded``, for methods that need no key: those that neither run nor read anything."""
    async with failing_well(context):
        yield understood(request)


def time_left_s(context: Context) -> float | None:
    """Returns what is left of the client's deadline, in seconds, or None if it set none."""
    left = context.time_remaining()
    return None if left is None or left == float("inf") else max(left, 0.001)
