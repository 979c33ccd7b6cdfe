"""API keys: who may make the router work."""

import hmac
from collections.abc import Iterable

from router.errors import Fault, RequestError


class ApiKeys:
    """The accepted keys, given as one key, several, or None for an open router.

    Keys are compared in constant time, all of them on every call, so that the time taken tells
    nothing about a key or its place in the list.
    """

    def __init__(self, keys: str | Iterable[str] | None) -> None:
        given = (keys,) if isinstance(keys, str) else tuple(keys or ())
        self._keys = tuple(key.encode() for key in given if key)

    def __bool__(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._keys)

    def check(self, authorization: str | bytes | None, key: str | bytes | None = None) -> None:
        """Checks the value of an ``authorization`` header or gRPC metadata entry.

        ``key`` is a bare one, as Anthropic's clients send it in ``x-api-key``; one of the two is
        enough.

        Raises RequestError(UNAUTHENTICATED) if neither is an accepted key, the former as ``Bearer
        KEY``. The scheme is case-insensitive (RFC 9110, 11.1), the key is not.
        """
        if not self._keys:
            return
        given = []
        if authorization:
            scheme, _, bearer = _bytes(authorization).partition(b" ")
            given.append(bearer.strip() if scheme.lower() == b"bearer" else b"")
        if key:
            given.append(_bytes(key))
        if not given:
            raise RequestError(
                Fault.UNAUTHENTICATED, "send the API key as `Authorization: Bearer KEY`"
            )
        accepted = [self._accepts(one) for one in given]
        if not any(accepted):
            raise RequestError(Fault.UNAUTHENTICATED, "this API key is not accepted")

    def _accepts(self, given: bytes) -> bool:
        matches = [hmac.compare_digest(given, accepted) for accepted in self._keys]
        return any(matches)


def _bytes(value: str | bytes) -> bytes:
    """What was sent: headers are read as Latin-1, whatever their bytes mean."""
    return value if isinstance(value, bytes) else value.encode("latin-1", "replace")
