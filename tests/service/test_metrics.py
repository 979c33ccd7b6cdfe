"""What a scrape shows."""

import pytest
from prometheus_client import CollectorRegistry

from router.core.effects import Admit, RunPlan
from router.core.events import Reason
from router.core.snapshot import GroupSnapshot, Snapshot
from router.errors import FAULT_OF_REASON, Fault, RequestError
from router.metrics import ERR_OF_FAULT, Histogram, Lifetime, Metrics
from router.metrics_batches import UNCOUNTED_MAX
from router.metrics_models import Sum
from tests.service.scraped import families_of

TGI_NAMES = {
    "tgi_request_count",
    "tgi_request_success",
    "tgi_request_failure",
    "tgi_request_duration",
    "tgi_request_validation_duration",
    "tgi_request_queue_duration",
    "tgi_request_inference_duration",
    "tgi_request_mean_time_per_token_duration",
    "tgi_request_generated_tokens",
    "tgi_request_input_length",
    "tgi_request_max_new_tokens",
    "tgi_queue_size",
    "tgi_batch_current_size",
    "tgi_batch_current_max_tokens",
    "tgi_batch_max_total_tokens",
    "tgi_batch_inference_count",
    "tgi_batch_inference_success",
    "tgi_batch_inference_failure",
    "tgi_batch_inference_duration",
    "tgi_batch_forward_duration",
    "tgi_batch_next_size",
    "tgi_batch_concat",
    "tgi_batch_filter_duration",
    "tgi_batch_decode_duration",
    "tgi_batch_concat_duration",
    "tgi_request_skipped_tokens",
}


def snapshot() -> Snapshot:
    groups = (
        GroupSnapshot("g", 1, "m", 3, 1, 1000, 300, 50, 2, 9),
        GroupSnapshot("h", 2, "m", 1, 0, 500, 40, 0, 1, 4),
    )
    return Snapshot(5, 4, groups, 6, 7, 80, 900)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = families_of(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def shown() -> Metrics:
    metrics = Metrics()
    metrics.watch(snapshot, lambda: {"g": True, "h": True, "i": False})
    return metrics


def test_names_of_tgi_are_kept() -> None:
    families = {family.name for family in families_of(shown().render().decode())}
    assert families >= TGI_NAMES


def test_tgis_counters_are_counters_to_scrapers() -> None:
    lines = shown().render().decode().splitlines()
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE "))
    counted = ("request_count", "request_success", "request_failure", "batch_concat")
    calls = tuple(f"batch_inference_{what}" for what in ("count", "success", "failure"))
    for name in (*counted, *calls):
        assert types[f"tgi_{name}"] == "counter"
    assert "untyped" not in types.values()


def test_gauges_come_from_the_core_at_each_scrape() -> None:
    seen = samples(shown())
    assert seen["tgi_queue_size", ()] == 5
    assert seen["tgi_batch_current_size", ()] == 4
    assert seen["tgi_batch_current_max_tokens", ()] == 340
    assert seen["roundhouse_kv_tokens_used", (("group", "g"),)] == 300
    assert seen["roundhouse_kv_tokens_cached", (("group", "g"),)] == 50
    assert seen["roundhouse_kv_tokens_total", (("group", "h"),)] == 500
    assert seen["roundhouse_groups_up", ()] == 2
    assert seen["roundhouse_groups", ()] == 3
    assert seen["roundhouse_preemptions_total", ()] == 6
    assert seen["roundhouse_prefix_hit_tokens_total", ()] == 80


def test_failures_are_counted_by_their_kind() -> None:
    metrics = Metrics()
    error = RequestError(Fault.OVERLOADED, "full")
    metrics.refused(error)
    metrics.refused(error)  # by the next layer
    life = Lifetime(3, 10, 1000)
    metrics.ended(life, Reason.WORKER_LOST, 1500)
    metrics.ended(life, Reason.CANCELLED, 1500)
    metrics.ended(life, Reason.STOP_STRING, 1500)
    seen = samples(metrics)
    assert seen["tgi_request_count", ()] == 4
    assert seen["tgi_request_success", ()] == 1
    assert seen["tgi_request_failure", (("err", "overloaded"),)] == 1
    assert seen["tgi_request_failure", (("err", "generation"),)] == 1
    assert seen["tgi_request_failure", (("err", "dropped"),)] == 1
    assert seen["tgi_request_queue_duration_sum", ()] == 1.5  # none of the three got a place
    assert seen["tgi_request_inference_duration_count", ()] == 0


@pytest.mark.parametrize("reason", [Reason.OVERLOADED, Reason.TOO_LONG, Reason.UNSUPPORTED])
def test_what_the_core_refuses_is_a_failure_and_nothing_else(reason: Reason) -> None:
    """So a gateway hears of the places that other gateways have taken."""
    metrics = Metrics()
    metrics.ended(Lifetime(3, 10, 1000), reason, 1000)
    seen = samples(metrics)
    counts = {name: value for (name, _), value in seen.items() if name.startswith("tgi_request_")}
    assert counts.pop("tgi_request_count") == 1
    assert seen["tgi_request_failure", (("err", ERR_OF_FAULT[FAULT_OF_REASON[reason]]),)] == 1
    assert not any(value for name, value in counts.items() if name != "tgi_request_failure")


def test_every_fault_has_a_label() -> None:
    assert set(ERR_OF_FAULT) == set(Fault)


def test_a_step_counts_its_tokens_at_once() -> None:
    metrics = Metrics()
    metrics.delivered(0.5, {20: 63, 40: 1})
    seen = samples(metrics)
    assert seen["roundhouse_inter_token_latency_seconds_count", ()] == 64
    assert round(seen["roundhouse_inter_token_latency_seconds_sum", ()], 6) == 1.3


def test_steps_are_told_apart_by_group() -> None:
    metrics = Metrics()
    metrics.batches.stepped("g", 0.5)
    metrics.batches.stepped("h", 0.25)
    metrics.batches.stepped("h", 0.25)
    seen = samples(metrics)
    assert seen["roundhouse_step_seconds_count", (("group", "h"),)] == 2
    assert seen["roundhouse_step_seconds_sum", (("group", "g"),)] == 0.5


def plan(plan_id: int, admitted: int, running: int) -> RunPlan:
    admits = tuple(Admit(100 + n, (1,), 1, 0, 0, None) for n in range(admitted))
    sequences = (*range(running), *(admit.sequence for admit in admits))
    return RunPlan("g", 1, plan_id, (), admits, sequences, (1,) * len(sequences))


def test_calls_are_told_apart_as_tgi_does() -> None:
    metrics = Metrics()
    calls = metrics.batches.group("g")
    for admitted, running in ((3, 0), (0, 3), (2, 3), (0, 0), (0, 5)):
        calls.sent(plan(1, admitted, running))
    for _ in range(4):
        calls.answered(0.25)
    calls.lost()  # with the last one still open
    calls.sent(plan(6, 1, 0))
    calls.answered(0.25)
    seen = samples(metrics)
    prefill, decode = (("method", "prefill"),), (("method", "decode"),)
    assert seen["tgi_batch_inference_count", prefill] == 3
    assert seen["tgi_batch_inference_success", prefill] == 3
    assert seen["tgi_batch_inference_count", decode] == 2
    assert seen["tgi_batch_inference_success", decode] == 1
    assert seen["tgi_batch_inference_failure", decode] == 1
    assert seen["tgi_batch_concat", (("reason", "chunking"),)] == 1
    assert (seen["tgi_batch_next_size_count", ()], seen["tgi_batch_next_size_sum", ()]) == (3, 6)
    assert seen["tgi_batch_forward_duration_sum", prefill] == 0.75
    assert seen["tgi_batch_forward_duration_count", decode] == 1
    assert seen["roundhouse_step_seconds_count", (("group", "g"),)] == 5
    assert seen["tgi_batch_decode_duration_count", prefill] == 3
    assert seen["tgi_batch_decode_duration_sum", prefill] == 0
    assert seen["tgi_batch_concat_duration_count", decode] == 1


def test_handing_out_tokens_is_timed_by_the_latest_call() -> None:
    metrics = Metrics()
    calls = metrics.batches.group("g")
    calls.sent(plan(1, 0, 2))
    calls.answered(0.25)
    metrics.delivered(0.5, {})
    seen = samples(metrics)
    assert seen["tgi_batch_filter_duration_sum", (("method", "decode"),)] == 0.5
    assert seen["tgi_batch_filter_duration_count", (("method", "prefill"),)] == 0


def test_calls_that_overlap_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two plans on the way, the second one's time begins when the first is answered."""
    now = iter((1.0, 1.0, 3.0, 4.0))
    monkeypatch.setattr("router.metrics_batches.perf_counter", lambda: next(now))
    metrics = Metrics()
    calls = metrics.batches.group("g")
    calls.sent(plan(1, 0, 1))
    calls.sent(plan(2, 0, 1))
    calls.answered(2.0)
    calls.answered(1.0)
    seen = samples(metrics)
    assert seen["tgi_batch_inference_duration_sum", (("method", "decode"),)] == 3.0


def test_a_step_is_counted_once_whenever_somebody_looks() -> None:
    metrics = Metrics()
    calls = metrics.batches.group("g")
    for number in range(1, 3 * UNCOUNTED_MAX):
        calls.sent(plan(number, 0, 2))
        calls.answered(0.25)
        metrics.delivered(0.5, {20: 2})
        assert len(metrics._uncounted) < UNCOUNTED_MAX > len(metrics.batches._uncounted)
        for _ in range(2 * (number in (1, 100, 3 * UNCOUNTED_MAX - 1))):
            seen = samples(metrics)
            decode, group = (("method", "decode"),), (("group", "g"),)
            assert seen["tgi_batch_inference_success", decode] == number
            assert seen["tgi_batch_inference_duration_count", decode] == number
            assert seen["tgi_batch_forward_duration_sum", decode] == number / 4
            assert seen["tgi_batch_filter_duration_sum", decode] == number / 2
            assert seen["roundhouse_step_seconds_sum", group] == number / 4
            assert seen["roundhouse_inter_token_latency_seconds_count", ()] == 2 * number
    assert metrics.models.steps("g") == {2: Sum(number, number / 4)}


def test_a_group_that_is_gone_leaves_no_series() -> None:
    metrics = Metrics()
    calls = metrics.batches.group("g")
    calls.sent(plan(1, 0, 2))
    calls.answered(0.25)
    metrics.batches.forget("g")
    assert not [labels for _, labels in samples(metrics) if ("group", "g") in labels]
    assert not metrics.models.steps("g")


def test_continuations_are_told_by_engine() -> None:
    metrics = Metrics()
    metrics.watch(snapshot, dict, lambda: {"g": "torch", "h": "llamacpp", "i": "torch"})
    for before, after in (("g", "h"), ("i", "h"), ("g", "i")):
        metrics.continued(before, after)
    seen = samples(metrics)
    name = "roundhouse_continuations_total"
    assert seen[name, (("from_engine", "torch"), ("to_engine", "llamacpp"))] == 2
    assert seen[name, (("from_engine", "torch"), ("to_engine", "torch"))] == 1


def test_a_bound_counts_what_does_not_exceed_it() -> None:
    histogram = Histogram("h", "", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.cumulated() == [("1", 2.0), ("2", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == 8.0


def test_a_registry_of_the_callers_own_is_used() -> None:
    registry = CollectorRegistry()
    assert Metrics(registry).registry is registry
    assert Metrics().registry is not registry
