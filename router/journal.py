"""What the log says of requests: a line for each when it ends or is refused, and never their texts.

A request has the name that its client knows, ``x-request-id``, and the number of its sequence, the
name that workers have for it. The first is a context variable: faces set it, and nothing between
them and the driver has a use for it. A gateway's requests are in the log of the gateway.
"""

import logging
import re
from contextvars import ContextVar
from uuid import uuid4

from router.core.events import Reason
from router.errors import RequestError
from router.logs import FIELDS
from router.metrics import Lifetime
from router.tracing import CALL

log = logging.getLogger(__name__)

NAME: ContextVar[str] = ContextVar("request_name", default="")
FAILURES = frozenset((Reason.WORKER_LOST, Reason.ENGINE_FAILED, Reason.SHUTDOWN))
"""Endings that are the fault of this side."""
_SAFE = re.compile(r"[!-~]{1,128}")
_FIELD = re.compile(r"[a-z0-9_.]{1,80}")


def name_request(given: str) -> str:
    """Names the request of this task, as its client does if that is safe to repeat; returns it."""
    name = given if _SAFE.fullmatch(given) else f"req_{uuid4().hex}"
    NAME.set(name)
    CALL.get().named(name)
    return name


def ended(request: int, life: Lifetime, reason: Reason, now_ms: int, detail: str = "") -> None:
    """A request that had been accepted is over."""
    level = logging.WARNING if reason in FAILURES else logging.INFO
    if not log.isEnabledFor(level):
        return
    facts: dict[str, object] = {
        "request": life.name,
        "trace_id": life.trace.trace_id,
        "sequence": request,
        "group": life.group,
        "reason": reason.value,
        "prompt_tokens": life.prompt_tokens,
        "cached_tokens": life.cached_tokens,
        "tokens": life.tokens,
        "queue_ms": _since(life.submitted_ms, life.admitted_ms),
        "first_token_ms": _since(life.submitted_ms, life.first_ms),
        "total_ms": now_ms - life.submitted_ms,
    }
    if detail and reason in FAILURES:
        facts["detail"] = detail
    _say(level, "request ended", facts)


def refused(error: RequestError) -> None:
    """A request was turned away. Why is the client's to read: the message may repeat its words."""
    field = error.field if error.field and _FIELD.fullmatch(error.field) else None
    known = {"request": NAME.get(), "trace_id": CALL.get().trace_id}
    _say(logging.INFO, "request refused", {**known, "reason": error.fault.value, "field": field})


def _since(from_ms: int, to_ms: int) -> int | None:
    return to_ms - from_ms if to_ms >= 0 else None


def _say(level: int, text: str, facts: dict[str, object]) -> None:
    """One line, with the facts that are known."""
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    log.log(level, text, extra={FIELDS: known})
