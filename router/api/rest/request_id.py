"""A name for every answer, in ``x-request-id``: OpenAI's clients report it with their errors.

Anthropic's look for it in ``request-id``, and in the error itself.
"""

import re
from uuid import uuid4

from starlette.types import Message, Scope, Send

HEADER = b"x-request-id"
ANTHROPIC_HEADER = b"request-id"
ANTHROPIC_PATH = "/v1/messages"
"""Where Anthropic's routes are."""
REQUEST_ID = "roundhouse.request_id"
"""Where the name is kept in the scope, as text."""
_SAFE = re.compile(rb"[!-~]{1,128}")


def naming(scope: Scope, send: Send) -> Send:
    """Returns a ``send`` that adds the header to the response.

    It is the request's own, if it has one that is safe to repeat, so that proxies and clients may
    choose it; else a new one.
    """
    given = next((value for name, value in scope.get("headers", ()) if name == HEADER), b"")
    own = given if _SAFE.fullmatch(given) else f"req_{uuid4().hex}".encode()
    scope[REQUEST_ID] = own.decode()
    names = [(HEADER, own)]
    if scope.get("path", "").startswith(ANTHROPIC_PATH):
        names.append((ANTHROPIC_HEADER, own))

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *names]}
        await send(message)

    return named
