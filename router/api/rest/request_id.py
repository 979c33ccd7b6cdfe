"""A name for every answer, in ``x-request-id``: OpenAI's clients report it with their errors.

Anthropic's look for it in ``request-id``, and in the error itself.
"""

from starlette.types import Message, Scope, Send

from router.journal import name_request

HEADER = b"x-request-id"
ANTHROPIC_HEADER = b"request-id"
ANTHROPIC_PATH = "/v1/messages"
"""Where Anthropic's routes are."""
REQUEST_ID = "roundhouse.request_id"
"""Where the name is kept in the scope, as text."""


def naming(scope: Scope, send: Send) -> Send:
    """Returns a ``send`` that adds the header to the response.

    It is the request's own, if it has one that is safe to repeat, so that proxies and clients may
    choose it; else a new one. The log has it, too.
    """
    given = next((value for name, value in scope.get("headers", ()) if name == HEADER), b"")
    scope[REQUEST_ID] = name_request(given.decode("latin-1"))
    own = scope[REQUEST_ID].encode()
    names = [(HEADER, own)]
    if scope.get("path", "").startswith(ANTHROPIC_PATH):
        names.append((ANTHROPIC_HEADER, own))

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *names]}
        await send(message)

    return named
