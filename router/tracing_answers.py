"""The span of an answer and those below it, for those who want traces; see ``tracing_spans``.

Where its time went and what became of its groups is told when it has ended, all at once.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from time import time_ns
from typing import TYPE_CHECKING, Any, cast

from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from router.core.effects import RunPlan
from router.core.events import Reason, Submitted
from router.errors import FAULT_OF_REASON, Fault
from router.tracing import Answer
from shards.v1.shard_pb2 import Sampling

if TYPE_CHECKING:
    from router.metrics import Lifetime

FALLS_MAX = 1000
"""Groups that went down which are remembered, for answers that were there."""
INT_MAX = 2**63 - 1
"""The largest number that can be told; one beyond would cost all that is sent with it."""
NS = 1_000_000

Attributes = dict[str, AttributeValue]
CARRIER = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class Fall:
    """A group went down, by the driver's clock."""

    group: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Stay:
    """A life of a group that an answer was admitted to: from when on, and with how many tokens.

    ``last_ms`` is when the latest of these came, -1 if that is not known here.
    """

    group: str
    epoch: int
    from_ms: int
    tokens: int
    last_ms: int


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes spans. ``schedules`` says that answers run here, not in a router behind."""

    tracer: Tracer
    schedules: bool
    falls: deque[Fall] = field(default_factory=lambda: deque(maxlen=FALLS_MAX))


class AnswerSpan(Answer):
    """An answer that is traced. The span begins when it is accepted: one that is not has none.

    ``failing`` is told of the fault that it ends with.
    """

    __slots__ = (
        "_base_ns", "_begun_ns", "_compiled_ns", "_context", "_failing", "_first_ns", "_kind",
        "_maker", "_operation", "_span", "_stays", "_tokenised_ns",
    )  # fmt: skip

    def __init__(
        self,
        maker: Maker,
        parent: Context,
        kind: SpanKind,
        operation: str = "text_completion",
        failing: Callable[[Fault], None] = lambda _: None,
    ) -> None:
        self._maker = maker
        self._context = parent
        self._kind = kind
        self._operation = operation
        self._failing = failing
        self._span: Span = INVALID_SPAN
        self._begun_ns = time_ns()
        self._tokenised_ns = self._compiled_ns = self._first_ns = self._base_ns = 0
        self._stays: list[Stay] = []

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to."""
        return trace_id_of(self._span)

    def tokenised(self) -> None:
        """The tokens of its prompt are known."""
        self._tokenised_ns = time_ns()

    def compiled(self) -> None:
        """The workers have compiled its constraint."""
        self._compiled_ns = time_ns()

    def submitted(self, request: Submitted, now_ms: int) -> None:
        """Begins the span, with what was asked for as far as it is numbers."""
        self._base_ns = time_ns() - now_ms * NS
        name = f"{self._operation} {request.adapter or request.model}"
        attributes = {"gen_ai.operation.name": self._operation, **_asked(request)}
        self._span = self._maker.tracer.start_span(
            name, self._context, self._kind, attributes, start_time=self._begun_ns
        )
        self._context = below(self._span)

    def admitted(self, plan: RunPlan, life: "Lifetime", now_ms: int, last_ms: int) -> None:
        """A group begins with it, or goes on with it."""
        self._stays.append(Stay(plan.group, plan.epoch, now_ms, life.tokens, last_ms))

    def begun(self) -> None:
        """Its first token is on the way to a gateway."""
        self._first_ns = time_ns()

    def context(self) -> tuple[str, str]:
        """W3C's ``traceparent`` and ``tracestate`` of this span."""
        carrier: dict[str, str] = {}
        CARRIER.inject(carrier, self._context)
        return carrier.get("traceparent", ""), carrier.get("tracestate", "")

    def ended(self, request: int, life: "Lifetime", reason: Reason, now_ms: int) -> None:
        """Tells all there is to tell."""
        fault = FAULT_OF_REASON.get(reason)
        if fault is not None:
            self._failing(fault)
            self._span.set_attribute("error.type", fault.value)
        if not self._span.is_recording():
            return
        self._span.set_attributes(_outcome(request, life, reason))
        self._tell_of_groups(now_ms)
        self._tell_of_phases(life, now_ms)
        if fault not in (None, Fault.CANCELLED):
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._at(now_ms))

    def _at(self, instant_ms: int) -> int:
        """An instant of the driver's clock, in nanoseconds since 1970."""
        return self._base_ns + instant_ms * NS

    def _tell_of_groups(self, end_ms: int) -> None:
        """What took it out of its group, each time, and how it went on."""
        ends = [*(stay.from_ms for stay in self._stays[1:]), end_ms]
        for stay, until_ms in zip(self._stays, ends, strict=False):
            if (fall := self._fall(stay, until_ms)) is not None:
                self._event("group.down", fall.at_ms, {"roundhouse.group": stay.group})
        for former, stay in pairwise(self._stays):
            self._event("resumed", stay.from_ms, self._resumption(former, stay))

    def _fall(self, stay: Stay, until_ms: int) -> Fall | None:
        """When the group went down while the answer was there, if it did."""
        for fall in self._maker.falls:
            if fall.group == stay.group and stay.from_ms <= fall.at_ms <= until_ms:
                return fall
        return None

    def _resumption(self, former: Stay, stay: Stay) -> Attributes:
        if self._fall(former, stay.from_ms) is not None:
            cause = "lost"
        elif (former.group, former.epoch) == (stay.group, stay.epoch):
            cause = "preempted"
        else:
            cause = "moved"
        found: Attributes = {
            "roundhouse.cause": cause,
            "roundhouse.group_before": former.group,
            "roundhouse.group": stay.group,
            "roundhouse.tokens": stay.tokens,
        }
        if stay.last_ms >= 0:
            found["roundhouse.silent_ms"] = stay.from_ms - stay.last_ms
        return found

    def _tell_of_phases(self, life: "Lifetime", now_ms: int) -> None:
        """What its time went into."""
        if self._tokenised_ns:
            self._child("tokenize", self._begun_ns, self._tokenised_ns)
        if self._compiled_ns:
            self._child("compile", self._tokenised_ns, self._compiled_ns)
        if not self._maker.schedules:
            return
        end_ns, first_ns = self._at(now_ms), self._first(life)
        if not self._stays:
            self._child("queue", self._at(life.submitted_ms), end_ns)
            return
        admitted_ns = self._at(life.admitted_ms)
        self._child("queue", self._at(life.submitted_ms), admitted_ns)
        self._child("prefill", admitted_ns, first_ns or end_ns, self._group_at(first_ns))
        if first_ns:
            self._child("decode", first_ns, end_ns, self._group_at(end_ns))

    def _first(self, life: "Lifetime") -> int:
        """When the first token came, in nanoseconds since 1970; 0 if none has."""
        if life.first_ms >= 0:
            return self._at(life.first_ms)
        return self._first_ns if life.tokens else 0

    def _group_at(self, instant_ns: int) -> Attributes:
        """The group that had it at an instant; the last one if that is 0."""
        known = [one.group for one in self._stays if self._at(one.from_ms) <= instant_ns]
        return {"roundhouse.group": (known or [self._stays[-1].group])[-1]}

    def _event(self, name: str, at_ms: int, attributes: Attributes) -> None:
        self._span.add_event(name, attributes, self._at(at_ms))

    def _child(
        self, name: str, from_ns: int, until_ns: int, attributes: Attributes | None = None
    ) -> None:
        child = self._maker.tracer.start_span(
            name, self._context, attributes=attributes, start_time=from_ns
        )
        child.end(max(from_ns, until_ns))


def below(span: Span) -> Context:
    """What makes other spans children of this one."""
    return set_span_in_context(span, Context())


def trace_id_of(span: Span) -> str:
    """The trace of a span, in hexadecimal digits; empty if it has none."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def _asked(request: Submitted) -> Attributes:
    """What was asked for, as far as it is numbers, and of which model. What is off is left out."""
    sampling = cast(Sampling, request.sampling)
    numbers: dict[str, Any] = {
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": sampling.seed if sampling.temperature and sampling.seed <= INT_MAX else 0,
    }
    given = {f"gen_ai.request.{name}": value for name, value in numbers.items() if value}
    return {
        "gen_ai.provider.name": "roundhouse",
        "gen_ai.request.model": request.adapter or request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        **given,
    }


def _outcome(request: int, life: "Lifetime", reason: Reason) -> Attributes:
    """How it ended, in numbers; seconds where the conventions have seconds."""
    found: Attributes = {
        "gen_ai.usage.input_tokens": life.prompt_tokens,
        "gen_ai.usage.output_tokens": life.tokens,
        "gen_ai.usage.cache_read.input_tokens": life.cached_tokens,
        "gen_ai.response.finish_reasons": (reason.value,),
        "roundhouse.sequence": request,
    }
    if life.group:
        found["roundhouse.group"] = life.group
    if life.admitted_ms >= 0:
        found["gen_ai.latency.time_in_queue"] = (life.admitted_ms - life.submitted_ms) / 1000
    if life.first_ms >= 0:
        found["gen_ai.response.time_to_first_chunk"] = (life.first_ms - life.submitted_ms) / 1000
    return found
