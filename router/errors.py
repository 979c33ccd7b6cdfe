"""The closed table of everything that can go wrong for a user, with its code on each wire."""

from dataclasses import dataclass
from enum import Enum

from router.core.events import Reason


class Fault(Enum):
    """A kind of failure. The value is the reason in ``google.rpc.ErrorInfo``."""

    VALIDATION = "VALIDATION"
    UNSUPPORTED = "UNSUPPORTED"
    TEMPLATE = "TEMPLATE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    TOO_LARGE = "TOO_LARGE"
    OVERLOADED = "OVERLOADED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE = "DEADLINE_EXCEEDED"
    WORKER_LOST = "WORKER_LOST"
    ENGINE_FAILED = "ENGINE_FAILED"
    CANCELLED = "CANCELLED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Wire:
    """How a fault looks outside: gRPC code name, HTTP status, TGI's error_type, OpenAI's type."""

    grpc: str
    http: int
    tgi: str
    openai: str
    retry_after_s: int | None = None


WIRE: dict[Fault, Wire] = {
    Fault.VALIDATION: Wire("INVALID_ARGUMENT", 422, "validation", "invalid_request_error"),
    Fault.UNSUPPORTED: Wire("UNIMPLEMENTED", 422, "validation", "invalid_request_error"),
    Fault.TEMPLATE: Wire("INVALID_ARGUMENT", 422, "template_error", "invalid_request_error"),
    Fault.MODEL_NOT_FOUND: Wire("NOT_FOUND", 404, "model_not_found", "invalid_request_error"),
    Fault.TOO_LARGE: Wire("RESOURCE_EXHAUSTED", 413, "validation", "invalid_request_error"),
    Fault.OVERLOADED: Wire("RESOURCE_EXHAUSTED", 429, "overloaded", "rate_limit_error", 1),
    Fault.UNAVAILABLE: Wire("UNAVAILABLE", 503, "unavailable", "server_error", 2),
    Fault.DEADLINE: Wire("DEADLINE_EXCEEDED", 504, "deadline_exceeded", "server_error", 1),
    Fault.WORKER_LOST: Wire("UNAVAILABLE", 424, "generation", "server_error", 2),
    Fault.ENGINE_FAILED: Wire("INTERNAL", 424, "generation", "server_error"),
    Fault.CANCELLED: Wire("CANCELLED", 499, "cancelled", "invalid_request_error"),
    Fault.UNAUTHENTICATED: Wire("UNAUTHENTICATED", 401, "unauthenticated", "authentication_error"),
    Fault.INTERNAL: Wire("INTERNAL", 500, "incomplete_generation", "server_error"),
}

FAULT_OF_REASON: dict[Reason, Fault] = {
    Reason.CANCELLED: Fault.CANCELLED,
    Reason.DEADLINE: Fault.DEADLINE,
    Reason.OVERLOADED: Fault.OVERLOADED,
    Reason.TOO_LONG: Fault.VALIDATION,
    Reason.UNSUPPORTED: Fault.UNSUPPORTED,
    Reason.WORKER_LOST: Fault.WORKER_LOST,
    Reason.ENGINE_FAILED: Fault.ENGINE_FAILED,
    Reason.SHUTDOWN: Fault.UNAVAILABLE,
}
"""Endings that are failures. The reasons missing here are ordinary ends of an answer."""


class RequestError(Exception):
    """A request that was refused or broke off. ``field`` names the parameter at fault, if any.

    ``counted`` says that metrics have it already.
    """

    def __init__(self, fault: Fault, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.field = field
        self.counted = False

    @property
    def wire(self) -> Wire:
        """The codes of this fault on each wire."""
        return WIRE[self.fault]


class TooLongError(RequestError):
    """A prompt that does not fit, alone or with its answer. Clients shorten it when they see it."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(Fault.VALIDATION, message, field)
