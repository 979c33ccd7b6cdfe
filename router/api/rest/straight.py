"""Requests that generate go to their handlers without the framework's search for them."""

from collections.abc import Iterable
from inspect import signature
from typing import TypeGuard

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send


class Straight:
    """Middleware that finds a handler by its path, where that is all there is to find out.

    FastAPI tries one route after the other, and then looks for what each argument is made of.
    Our handlers of POST take the request and nothing else. They answer their failures themselves.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if _is_plain(route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the handler, or leaves the request to the framework."""
        route = self._routes.get(scope["path"]) if scope.get("method") == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # for traces
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)


def _is_plain(route: BaseRoute) -> TypeGuard[APIRoute]:
    return (
        isinstance(route, APIRoute)
        and route.methods == {"POST"}
        and "{" not in route.path
        and list(signature(route.endpoint).parameters) == ["request"]
    )
