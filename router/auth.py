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

    def check(self, authorization: str | bytes | None) -> None:
        """Checks the value of an ``authorization`` header or gRPC metadata entry.

        Raises RequestError(UNAUTHENTICATED) if it is not ``Bearer KEY`` with an accepted key. The
        scheme is case-insensitive (RFC 9110, 11.1), the key is not.
        """
        if not self._keys:
            return
        if not authorization:
            raise RequestError(
                Fault.UNAUTHENTICATED, "send the API key as `Authorization: Bearer KEY`"
            )
        raw = authorization if isinstance(authorization, bytes) else authorization.encode()
        scheme, _, key = raw.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), accepted) for accepted in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(Fault.UNAUTHENTICATED, "this API key is not accepted")
