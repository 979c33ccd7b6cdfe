"""``grpc.health.v1`` over the fleet."""

import asyncio
from collections.abc import Collection

import grpc.aio
from grpc_health.v1 import health_pb2

from router.api.grpc_calls import STREAM, UNARY, Context, Handler, Received, handler, opened
from router.fleet import Fleet

SERVICE = "grpc.health.v1.Health"
POLL_S = 1.0


class Health:
    """SERVING while some model can take requests, for each service alike. Load plays no part.

    The state is read from the fleet when somebody asks, so that there is none to keep up to date;
    a Watch looks once a second.
    """

    def __init__(self, fleet: Fleet, services: Collection[str]) -> None:
        self._fleet = fleet
        self._known = frozenset(("", *services))

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse.ServingStatus
        if service not in self._known:
            return health_pb2.HealthCheckResponse(status=states.SERVICE_UNKNOWN)
        status = states.SERVING if self._fleet.healthy else states.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)

    async def check(
        self, request: Received[health_pb2.HealthCheckRequest], context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Says how it is now."""
        async with opened(request, context) as known:
            found = self._status(known.service)
            if found.status == health_pb2.HealthCheckResponse.ServingStatus.SERVICE_UNKNOWN:
                text = f"no service {known.service[:100]!r}"
                await context.abort(grpc.StatusCode.NOT_FOUND, text)
            return found
        raise AssertionError("either returned or aborted")

    async def watch(
        self, request: Received[health_pb2.HealthCheckRequest], context: Context
    ) -> None:
        """Says how it is now and at every change, until the client leaves."""
        async with opened(request, context) as known:
            last = None
            while True:
                found = self._status(known.service)
                if found != last:
                    await context.write(found)
                    last = found
                await asyncio.sleep(POLL_S)

    def handlers(self) -> dict[str, Handler]:
        """The methods of the service."""
        request, response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        return {
            "Check": handler(UNARY, self.check, request, response),
            "Watch": handler(STREAM, self.watch, request, response),
        }
