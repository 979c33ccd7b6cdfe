"""What every route is given, and the steps that all routes have in common."""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from router.api.rest.body import Body, parse
from router.api.rest.errors import Dialect, error_response, first_fault
from router.api.rest.presence import ClientLeft, while_present
from router.api.rest.sse import known_fault
from router.auth import ApiKeys
from router.chat import ChatService
from router.config import Settings
from router.fleet import Fleet
from router.metrics import Metrics
from router.service import Service

B = TypeVar("B", bound=Body)
Work = Callable[[B, float], Coroutine[Any, Any, Response]]
"""Answers a checked body that arrived at this instant (perf_counter, seconds)."""


@dataclass(frozen=True, slots=True)
class Context:
    """The rest of the router, as the routes see it."""

    service: Service
    fleet: Fleet
    metrics: Metrics
    settings: Settings
    keys: ApiKeys
    chat: ChatService

    async def answer(
        self,
        request: Request,
        model: type[B],
        dialect: Dialect,
        work: Work[B],
        *,
        generates: bool = True,
    ) -> Response:
        """Checks key and body, then runs ``work`` for as long as the client stays.

        Every failure becomes the error response of the dialect, and is one in the metrics unless
        the route ``generates`` nothing.
        """
        arrived = perf_counter()
        try:
            headers = request.headers
            self.keys.check(headers.get("authorization"), headers.get("x-api-key"))
            body = await parse(request, model, self.settings.payload_limit)
            answer = work(body, arrived)
            return await while_present(
                request.receive, self._counted(answer) if generates else answer
            )
        except ClientLeft:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 -- logged, and answered as INTERNAL
            return error_response(known_fault(error), dialect, request.scope)

    async def _counted(self, work: Awaitable[Response]) -> Response:
        """Runs it, and counts what a route refuses by itself; the service counts the rest.

        As in TGI, a body that cannot be read and a key that is wrong are no requests.
        """
        try:
            return await work
        except Exception as error:
            fault = first_fault(error)
            if fault is not None:
                self.service.refused(fault)
            raise


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    """Returns a JSON answer, status 200."""
    return Response(orjson.dumps(value), 200, headers, media_type="application/json")
