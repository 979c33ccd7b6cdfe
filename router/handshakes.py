"""Why two ends of a connection did not come together: what gRPC says, in words for a user.

gRPC's own texts differ between releases, so what is looked for is what its TLS library says.
"""

import re
from dataclasses import dataclass

OPTIONS = "--cluster-ca, --cluster-cert and --cluster-key"
_UNTRUSTED = ("issuer", "self signed", "self-signed", "unknown ca")
_CLOSED = ("socket closed", "connection reset", "broken pipe", "read failed", "end of file")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """``certain``: trying again is of no use before somebody changes something."""

    text: str
    certain: bool


def mismatch(details: str, *, encrypted: bool) -> Mismatch | None:
    """What gRPC's details of a failure to connect over TCP say of TLS or its lack, if anything.

    ``encrypted``: this end speaks TLS.
    """
    said = details.lower()
    if "http1.x server" in said:
        return Mismatch("it answers as a port of REST does: give its port of gRPC", certain=True)
    if encrypted and (certain := _certain(said)):
        return Mismatch(certain, certain=True)
    if not is_closed(details):
        return None
    if encrypted:
        text = (
            "it closed the connection: it may not accept the certificate in --cluster-cert, "
            "or nobody serves there yet"
        )
        return Mismatch(text, certain=False)
    return Mismatch(f"it closed the connection: it may expect {OPTIONS}", certain=False)


def is_closed(details: str) -> bool:
    """Whether gRPC's details say that the other end, or what is between, closed the connection."""
    said = details.lower()
    return any(word in said for word in _CLOSED)


def _certain(said: str) -> str | None:
    if "wrong_version_number" in said or "http_request" in said:
        return "it does not speak TLS, which --cluster-ca asks for"
    if "hostname verification" in said or "is not in peer certificate" in said:
        return "its certificate is for other host names and addresses than this one"
    if refused := re.search(r"certificate_verify_failed:?\s*([^:]*)", said):
        cause = refused[1].strip()
        if any(word in cause for word in _UNTRUSTED):
            return f"its certificate is not by the CA in --cluster-ca ({cause})"
        return f"its certificate is refused ({cause or 'no more is known'})"
    if "handshake failed" in said or "security handshaker" in said:
        return f"no TLS with it: {said.partition('last error: unknown: ')[2] or said}"
    return None
