"""A name for every answer, in ``x-request-id``: OpenAI's clients report it with their errors."""

import re
from uuid import uuid4

from starlette.types import Message, Scope, Send

HEADER = b"x-request-id"
_SAFE = re.compile(rb"[!-~]{1,128}")


def naming(scope: Scope, send: Send) -> Send:
    """Returns a ``send`` that adds the header to the response.

    It is the request's own, if it has one that is safe to repeat, so that proxies and clients may
    choose it; else a new one.
    """
    given = next((value for name, value in scope.get("headers", ()) if name == HEADER), b"")
    own = given if _SAFE.fullmatch(given) else f"req_{uuid4().hex}".encode()

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (HEADER, own)]}
        await send(message)

    return named
