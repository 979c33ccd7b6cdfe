"""The numbers of batches, by TGI's names and with TGI's meaning, and of the steps of each group.

To TGI a call of the model that begins new requests is a ``prefill``, whatever else it computes, and
any other a ``decode``; later chunks of a prompt go on in decodes (backends/v3/src/backend.rs). Here
a call is a plan with work, and one that admits sequences is a prefill. Everything happens once per
step at most, and what a step tells is counted when there is more of it, or somebody looks: code
that runs once per step finds the caches full of the model's weights.
"""

from collections import deque
from collections.abc import Iterator
from time import perf_counter

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)

from router.core.effects import RunPlan
from router.metrics_histogram import SECONDS, SEQUENCES, Histogram
from router.metrics_models import Models

METHODS = ("prefill", "decode")

UNCOUNTED_MAX = 64
"""Records that are kept before they are counted."""


class Calls:
    """The plans that one group has not answered yet, in order; None for one without work."""

    def __init__(self, batches: "Batches", group: str) -> None:
        self._batches = batches
        self._group = group
        self._sums = batches.models.sums(group)
        self._open: deque[tuple[str, float, int] | None] = deque()
        self._free_s = 0.0

    def sent(self, plan: RunPlan) -> None:
        """A plan was sent to the group."""
        if not plan.work_sequences:
            self._open.append(None)
            return
        method = "prefill" if plan.admits else "decode"
        self._batches.counts[method] += 1
        if plan.admits:
            self._batches.joined(len(plan.admits), len(plan.work_sequences))
        self._open.append((method, perf_counter(), len(plan.work_sequences)))

    def answered(self, engine_s: float) -> None:
        """The oldest plan was answered; its engine took so many seconds for it.

        The call counts from when it was sent, or from the answer before it if that came later: the
        group works on one plan after the other.
        """
        now_s = perf_counter()
        call = self._open.popleft()
        if call is None:
            self._batches.stepped(self._group, engine_s)
        else:
            method, sent_s, sequences = call
            call_s = now_s - max(sent_s, self._free_s)
            self._batches.stepped(self._group, engine_s, method, call_s)
            self._sums[sequences].add(engine_s)
        self._free_s = now_s

    def died(self) -> None:
        """The group has been lost, as opposed to having left or been let go."""
        self._batches.died(self._group)

    def lost(self) -> None:
        """The group is down: nothing that is open will be answered."""
        for call in self._open:
            if call is not None:
                self._batches.failed(call[0])
        self._open.clear()


class Batches:
    """Counts calls over all groups, and steps by group. ``models`` hears of the latter, too.

    ``counts`` are the calls that began, by method; ``latest`` is the method of the latest answered.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.counts = dict.fromkeys(METHODS, 0)
        self.latest = METHODS[0]
        self._successes = dict.fromkeys(METHODS, 0)
        self._failures = dict.fromkeys(METHODS, 0)
        self._joined = 0
        self._sizes = Histogram("tgi_batch_next_size", "Requests that begin together", SEQUENCES)
        self._calls = {method: Histogram("", "", SECONDS) for method in METHODS}
        self._engines = {method: Histogram("", "", SECONDS) for method in METHODS}
        self._deliveries = {method: Histogram("", "", SECONDS) for method in METHODS}
        self._steps: dict[str, Histogram] = {}
        self._uncounted: list[tuple[str, float, str | None, float]] = []
        self._losses: dict[str, int] = {}

    def group(self, name: str) -> Calls:
        """The calls of a group, whose losses are 0 from now on: a rise from nothing is not seen."""
        self._losses.setdefault(name, 0)
        return Calls(self, name)

    def died(self, group: str) -> None:
        """A group that was up has been lost."""
        self._losses[group] = self._losses.get(group, 0) + 1

    def joined(self, admitted: int, sequences: int) -> None:
        """A call began: ``admitted`` sequences are new, of ``sequences`` that it computes."""
        self._sizes.observe(admitted)
        self._joined += sequences > admitted

    def failed(self, method: str) -> None:
        """A call will not be answered."""
        self._failures[method] += 1

    def delivered(self, method: str, seconds: float) -> None:
        """The tokens of a call were handed to their requests."""
        self._deliveries[method].observe(seconds)

    def stepped(
        self, group: str, engine_s: float, method: str | None = None, call_s: float = 0.0
    ) -> None:
        """An engine took so long for a step, and its call so long if it was one."""
        if method is not None:
            self.latest = method
        self._uncounted.append((group, engine_s, method, call_s))
        if len(self._uncounted) >= UNCOUNTED_MAX:
            self._count()

    def _count(self) -> None:
        """Counts the steps that were only noted so far."""
        uncounted, self._uncounted = self._uncounted, []
        for group, engine_s, method, call_s in uncounted:
            if group not in self._steps:
                self._steps[group] = Histogram("", "", SECONDS)
            self._steps[group].observe(engine_s)
            if method is not None:
                self._successes[method] += 1
                self._calls[method].observe(call_s)
                self._engines[method].observe(engine_s)

    def forget(self, group: str) -> None:
        """A group is gone for good, and so are its series, as those of a server that has ended."""
        self._count()
        self._steps.pop(group, None)
        self._losses.pop(group, None)
        self.models.forget(group)

    def collect(self) -> Iterator[Metric]:
        """Yields every metric family of this module."""
        self._count()
        for name, text, counts in (
            ("tgi_batch_inference_count", "Calls of the model", self.counts),
            ("tgi_batch_inference_success", "Calls that were answered", self._successes),
            ("tgi_batch_inference_failure", "Calls lost with their workers", self._failures),
        ):
            family = UnknownMetricFamily(name, text, labels=["method"])
            for method, number in counts.items():
                family.add_metric([method], number)
            yield family
        joined = UnknownMetricFamily(
            "tgi_batch_concat", "Calls in which requests join running ones", labels=["reason"]
        )
        joined.add_metric(["chunking"], self._joined)
        yield joined
        yield HistogramMetricFamily(
            self._sizes.name,
            self._sizes.help_text,
            buckets=self._sizes.cumulated(),
            sum_value=self._sizes.sum,
        )
        for name, text, label, histograms in (
            ("tgi_batch_inference_duration", "Seconds of a call", "method", self._calls),
            ("tgi_batch_forward_duration", "Seconds of it in the engine", "method", self._engines),
            ("tgi_batch_filter_duration", "Seconds to hand out tokens", "method", self._deliveries),
            ("roundhouse_step_seconds", "Seconds of the engine for a step", "group", self._steps),
        ):
            durations = HistogramMetricFamily(name, text, labels=[label])
            for value, histogram in histograms.items():
                durations.add_metric([value], histogram.cumulated(), histogram.sum)
            yield durations
        losses = CounterMetricFamily(
            "roundhouse_group_losses", "Times that a group went down unasked", labels=["group"]
        )
        for group, number in self._losses.items():
            losses.add_metric([group], number)
        yield losses
        drawing = "Always 0: tokens are drawn within the step of the engine"
        yield _no_time("tgi_batch_decode_duration", drawing, self._successes)
        joining = "Always 0: requests join a batch without being copied"
        yield _no_time("tgi_batch_concat_duration", joining, {"decode": self._joined})


def _no_time(name: str, text: str, counts: dict[str, int]) -> Metric:
    """A histogram of what takes no time of its own here, so that dashboards show that."""
    family = HistogramMetricFamily(name, text, labels=["method"])
    for method, number in counts.items():
        histogram = Histogram("", "", SECONDS)
        histogram.observe(0.0, number)
        family.add_metric([method], histogram.cumulated(), histogram.sum)
    return family
