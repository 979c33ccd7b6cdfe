"""Tells of the calls of the gRPC port to those who trace them; off, nothing of it is there."""

from collections.abc import Awaitable, Callable, Collection
from typing import Any, cast

import grpc.aio

from router.api.grpc_calls import Context, Handler
from router.tracing import Tracing

Behaviour = Callable[[Any, Context], Awaitable[Any]]
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Traced(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in stubs alone
    """Wraps the methods of some services."""

    def __init__(self, tracing: Tracing, services: Collection[str]) -> None:
        self._tracing = tracing
        self._services = frozenset(services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Returns the method, in a span of its call."""
        found = await continuation(handler_call_details)
        method = handler_call_details.method
        if found is None or method.split("/")[1] not in self._services:
            return found
        kind = next(kind for kind in KINDS if getattr(found, kind) is not None)
        traced: Handler = cast(Any, found)._replace(
            **{kind: self._within(method, getattr(found, kind))}
        )
        return traced

    def _within(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def traced(request: Any, context: Context) -> Any:
            metadata = dict(context.invocation_metadata() or ())
            with self._tracing.rpc(method, metadata) as call:
                try:
                    answer = await behaviour(request, context)
                except Exception:
                    call.status(_name(context.code()))
                    raise
                call.status(_name(context.code()))
                return answer

        return traced


def _name(code: Any) -> str:
    """The name of a status, which grpcio keeps as a number until it is sent."""
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code or 0
    return next(one.name for one in grpc.StatusCode if one.value[0] == number)
