"""What the router tells Prometheus: TGI's names where they mean the same, ``roundhouse_`` else.

A request is one answer that is asked for: n answers to m prompts are n times m of them, and so are
the candidates of best_of. It is counted once, when it ends or is refused. Nothing here is called
once per token; a step is noted when it is delivered, and counted with others later; gauges are read
from the core at the moment of a scrape. All of it runs on the event loop, so the histograms need no
lock.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from router.core.events import Reason
from router.core.snapshot import Snapshot
from router.errors import FAULT_OF_REASON, Fault, RequestError
from router.metrics_batches import UNCOUNTED_MAX, Batches
from router.metrics_histogram import SECONDS, TOKENS, Histogram
from router.metrics_models import Models
from router.tracing import NO_ANSWER, Answer

ERR_OF_FAULT: dict[Fault, str] = {
    Fault.VALIDATION: "validation",
    Fault.UNSUPPORTED: "validation",
    Fault.TEMPLATE: "template",
    Fault.MODEL_NOT_FOUND: "validation",
    Fault.TOO_LARGE: "validation",
    Fault.OVERLOADED: "overloaded",
    Fault.UNAVAILABLE: "unavailable",
    Fault.DEADLINE: "deadline",
    Fault.WORKER_LOST: "generation",
    Fault.ENGINE_FAILED: "generation",
    Fault.CANCELLED: "dropped",
    Fault.UNAUTHENTICATED: "unauthenticated",
    Fault.INTERNAL: "incomplete",
}
"""The ``err`` label of ``tgi_request_failure``; TGI's words where it has one."""

REFUSALS = frozenset({Reason.OVERLOADED, Reason.TOO_LONG, Reason.UNSUPPORTED})
"""Ends of requests that the core did not take. They say nothing of how long requests take."""


@dataclass(slots=True)
class Lifetime:
    """One request in numbers. Instants are the driver's milliseconds, -1 before they come.

    ``cached_tokens`` counts the prompt tokens that a resident sequence had already computed;
    ``group`` is the latest that it was admitted to, ``model`` the one that it is for, ``name`` what
    its client calls it. ``trace`` is told what becomes of it.
    """

    prompt_tokens: int
    tokens_max: int
    submitted_ms: int
    admitted_ms: int = -1
    first_ms: int = -1
    tokens: int = 0
    cached_tokens: int = 0
    group: str = ""
    model: str = ""
    name: str = ""
    trace: Answer = NO_ANSWER

    @property
    def queued_ms(self) -> int:
        """How long it waited for a place; 0 before it has one."""
        return max(0, self.admitted_ms - self.submitted_ms)


class Metrics(Collector):
    """All metrics of one router. Registers itself with the registry that it is given.

    A process that schedules nothing, a gateway, tells of its requests alone: their router tells of
    calls and groups.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, schedules: bool = True
    ) -> None:
        self._schedules = schedules
        self.registry = registry if registry is not None else CollectorRegistry()
        self._requests = 0
        self._successes = 0
        self._failures = dict.fromkeys(ERR_OF_FAULT.values(), 0)
        self._generated = 0
        self._histograms: list[Histogram] = []
        new = self._histogram
        self._duration = new("tgi_request_duration", "Seconds from submission to end", SECONDS)
        self._validation = new(
            "tgi_request_validation_duration", "Seconds of checks and tokenisation", SECONDS
        )
        self._queue = new("tgi_request_queue_duration", "Seconds before the first plan", SECONDS)
        self._inference = new(
            "tgi_request_inference_duration", "Seconds from the first plan to the end", SECONDS
        )
        self._per_token = new(
            "tgi_request_mean_time_per_token_duration",
            "Seconds per generated token of a request, waiting left out",
            SECONDS,
        )
        self._tokens = new("tgi_request_generated_tokens", "Generated tokens per request", TOKENS)
        self._input = new("tgi_request_input_length", "Prompt tokens per request", TOKENS)
        self._asked = new("tgi_request_max_new_tokens", "Tokens allowed per request", TOKENS)
        self._first = new(
            "roundhouse_time_to_first_token_seconds",
            "Seconds from submission to the first token",
            SECONDS,
        )
        self._gap = new(
            "roundhouse_inter_token_latency_seconds",
            "Seconds between a token and the one before it in the same answer",
            SECONDS,
        )
        self._skipped = new(
            "tgi_request_skipped_tokens",
            "Tokens guessed ahead that were right, per generated token: none are guessed",
            (0.0, 1.0),
        )
        self.models = Models()
        self.batches = Batches(self.models)
        self._uncounted: list[tuple[str, float, Mapping[int, int]]] = []
        self._continued: dict[tuple[str, str], int] = {}
        self._engines: Callable[[], Mapping[str, str]] = dict
        self._snapshot: Callable[[], Snapshot] | None = None
        self._groups: Callable[[], Mapping[str, bool]] = dict
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, CPU, and files of the system's process

    def _histogram(self, name: str, help_text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, help_text, bounds)
        self._histograms.append(histogram)
        return histogram

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        # What is of no known type to the library are TGI's counters, without the suffix that it
        # gives to every counter. Scrapers that go by the type would pass them over.
        return generate_latest(self.registry).replace(b" untyped\n", b" counter\n")

    def watch(
        self,
        snapshot: Callable[[], Snapshot],
        groups: Callable[[], Mapping[str, bool]],
        engines: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Says where gauges come from: the core, and for each group if it is up, and its engine."""
        self._snapshot = snapshot
        self._groups = groups
        self._engines = engines

    # --- what happens

    def validated(self, seconds: float) -> None:
        """A request was checked and tokenised."""
        self._validation.observe(seconds)

    def refused(self, error: RequestError) -> None:
        """A request was turned away before the core saw it.

        Once, however many hands its error goes through.
        """
        if not error.counted:
            error.counted = True
            self._requests += 1
            self._failures[ERR_OF_FAULT[error.fault]] += 1

    def first_token(self, waited_ms: int) -> None:
        """A request has its first token."""
        self._first.observe(waited_ms / 1000)

    def delivered(self, seconds: float, gaps_ms: Mapping[int, int]) -> None:
        """The tokens of the latest call were handed to their requests, which took so long.

        ``gaps_ms`` tells for each time since the token before how many tokens had it.
        """
        self._uncounted.append((self.batches.latest, seconds, gaps_ms))
        if len(self._uncounted) >= UNCOUNTED_MAX:
            self._count()

    def _count(self) -> None:
        """Counts the deliveries that were only noted so far."""
        uncounted, self._uncounted = self._uncounted, []
        for method, seconds, gaps_ms in uncounted:
            self.batches.delivered(method, seconds)
            for gap_ms, times in gaps_ms.items():
                self._gap.observe(gap_ms / 1000, times)

    def continued(self, before: str, after: str) -> None:
        """A sequence whose tokens were delivered in part goes on in another group."""
        engines = self._engines()
        pair = engines.get(before, before), engines.get(after, after)
        self._continued[pair] = self._continued.get(pair, 0) + 1

    def ended(self, life: Lifetime, reason: Reason, now_ms: int) -> None:
        """A request that the core knew has ended."""
        self._requests += 1
        fault = FAULT_OF_REASON.get(reason)
        if fault is None:
            self._successes += 1
        else:
            self._failures[ERR_OF_FAULT[fault]] += 1
        if reason in REFUSALS and life.admitted_ms < 0:
            return
        self._generated += life.tokens
        self._input.observe(life.prompt_tokens)
        self._asked.observe(life.tokens_max)
        self._tokens.observe(life.tokens)
        self._skipped.observe(0, life.tokens)
        self._duration.observe((now_ms - life.submitted_ms) / 1000)
        if life.admitted_ms < 0:
            self._queue.observe((now_ms - life.submitted_ms) / 1000)
            return
        self._queue.observe((life.admitted_ms - life.submitted_ms) / 1000)
        inference_s = (now_ms - life.admitted_ms) / 1000
        self._inference.observe(inference_s)
        if life.tokens:
            self._per_token.observe(inference_s / life.tokens)

    # --- what a scrape sees

    def collect(self) -> Iterator[Metric]:
        """Yields every metric family."""
        self._count()
        # TGI's counters lack the suffix _total that this library gives to every counter.
        yield UnknownMetricFamily("tgi_request_count", "Counts requests", self._requests)
        yield UnknownMetricFamily(
            "tgi_request_success", "Counts requests answered to an ordinary end", self._successes
        )
        failures = UnknownMetricFamily(
            "tgi_request_failure", "Counts requests refused or broken off", labels=["err"]
        )
        for err, number in self._failures.items():
            failures.add_metric([err], number)
        yield failures
        yield CounterMetricFamily(
            "roundhouse_generated_tokens", "Tokens of ended requests", value=self._generated
        )
        for histogram in self._histograms:
            yield HistogramMetricFamily(
                histogram.name,
                histogram.help_text,
                buckets=histogram.cumulated(),
                sum_value=histogram.sum,
            )
        if not self._schedules:
            return
        yield from self.batches.collect()
        yield self._of_continued()
        if self._snapshot is not None:
            yield from _of_groups(self._groups())
            yield from _of_snapshot(self._snapshot())

    def _of_continued(self) -> Metric:
        """Continuations by kind of engine."""
        family = CounterMetricFamily(
            "roundhouse_continuations",
            "Answers that went on in another group after a part was delivered",
            labels=["from_engine", "to_engine"],
        )
        for labels, number in self._continued.items():
            family.add_metric(list(labels), number)
        return family


def _of_groups(groups: Mapping[str, bool]) -> Iterable[Metric]:
    yield GaugeMetricFamily("roundhouse_groups", "Groups configured", value=len(groups))
    yield GaugeMetricFamily("roundhouse_groups_up", "Groups connected", value=sum(groups.values()))
    up = GaugeMetricFamily(
        "roundhouse_group_up", "Whether the group is connected", labels=["group"]
    )
    for name, connected in groups.items():
        up.add_metric([name], connected)
    yield up


def _of_snapshot(core: Snapshot) -> Iterable[Metric]:
    """Gauges and the core's own counters."""
    held = sum(group.kv_used for group in core.groups)
    total = sum(group.kv_total for group in core.groups)
    for name, text, value in (
        ("tgi_queue_size", "Requests that wait for a place", core.waiting),
        ("tgi_batch_current_size", "Sequences running", core.running),
        ("tgi_batch_current_max_tokens", "Tokens that running sequences hold or reserve", held),
        ("tgi_batch_max_total_tokens", "Tokens that all groups hold", total),
        ("roundhouse_requests_waiting", "Requests that wait for a place", core.waiting),
        ("roundhouse_requests_running", "Sequences running", core.running),
    ):
        yield GaugeMetricFamily(name, text, value=value)
    for name, text, value in (
        ("roundhouse_preemptions", "Running sequences put back for want of memory", core.preempted),
        ("roundhouse_resumptions", "Sequences started anew after a loss", core.resumed),
        ("roundhouse_moves", "Running sequences moved out of groups that leave", core.moved),
        ("roundhouse_prefix_hit_tokens", "Tokens not computed: shared", core.prefix_hit_tokens),
        ("roundhouse_admitted_tokens", "Tokens of admitted sequences", core.admitted_tokens),
    ):
        yield CounterMetricFamily(name, text, value=value)
    used = GaugeMetricFamily(
        "roundhouse_kv_tokens_used", "Tokens that running sequences hold", labels=["group"]
    )
    donors = GaugeMetricFamily(
        "roundhouse_kv_tokens_cached", "Tokens of ended answers kept to share", labels=["group"]
    )
    whole = GaugeMetricFamily(
        "roundhouse_kv_tokens_total", "Tokens that the group can hold", labels=["group"]
    )
    for group in core.groups:
        used.add_metric([group.name], group.kv_used)
        donors.add_metric([group.name], group.kv_donors)
        whole.add_metric([group.name], group.kv_total)
    yield from (used, donors, whole)
