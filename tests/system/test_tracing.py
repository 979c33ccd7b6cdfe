"""Traces of real processes: a gateway, a router and its workers, one of which is killed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.tgi_translate import translate
from tests.service.collector import CALLER, TRACE, Collector, collecting
from tests.system.server import Server, eventually, gateway, serving
from tests.system.test_cli import only_line, roundhouse
from tests.system.test_tgi_launcher import launched

SCRIPTED = ("--engine", "scripted", "--engine-option", "step_ms=5")
PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
SHORT = {"inputs": "Count", "parameters": {"max_new_tokens": 8}}
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def ended(server: Server) -> None:
    """It sends what is left when it is told to end."""
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def fields(log: Path) -> list[dict[str, object]]:
    """The fields of the lines of requests in a log of JSON objects."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line["fields"] for line in lines if line.get("target") == "router.journal"]


def test_a_stream_through_a_gateway_that_survives_its_worker_is_one_trace(
    tmp_path: Path, collector: Collector
) -> None:
    otlp = ("--otlp-endpoint", collector.endpoint)
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 200}}
    with (
        serving(tmp_path, *SCRIPTED, *otlp) as router,
        gateway(tmp_path, router.grpc, *otlp, "--otlp-service-name", "edge") as before,
    ):
        first = router.worker_pid()
        with before.client.stream("POST", "/generate_stream", json=body, headers=PARENT) as answer:
            lines = (line for line in answer.iter_lines() if line)
            seen = [next(lines)]
            os.kill(first, signal.SIGKILL)
            seen += lines
        assert len(seen) == 200
        ended(before)
        ended(router)
    call = collector.one("POST /generate_stream")
    assert (call.service, call.trace, call.parent) == ("edge", TRACE, CALLER)
    (asked,) = [span for span in collector.below(call) if span.kind == "client"]
    (run,) = [span for span in collector.below(asked) if span.kind == "server"]
    assert (run.service, run.trace, run.failed) == ("roundhouse", TRACE, False)
    assert run.attributes["gen_ai.usage.output_tokens"] == 200
    group = run.attributes["roundhouse.group"]
    assert run.event("group.down") == {"roundhouse.group": group}
    assert run.event("resumed")["roundhouse.cause"] == "lost"
    assert [one.name for one in collector.below(run)] == ["queue", "prefill", "decode"]
    (line,) = fields(tmp_path / "gateway")
    assert (line["trace_id"], line["tokens"]) == (TRACE, 200)


def test_a_server_serves_and_ends_without_its_collector(tmp_path: Path) -> None:
    with serving(tmp_path, *SCRIPTED, "--otlp-endpoint", NOBODY) as server:
        assert server.client.post("/generate", json=SHORT).status_code == 200
        log = tmp_path / "stderr"
        eventually(lambda: "router.tracing_export" in log.read_text())
        began_s = time.monotonic()
        assert server.client.post("/generate", json=SHORT).status_code == 200
        assert time.monotonic() - began_s < 2
        began_s = time.monotonic()
        ended(server)
        assert time.monotonic() - began_s < 15
    said = log.read_text()
    assert said.count("traces: ") == 1
    assert "Traceback" not in said
    assert "opentelemetry." not in said


def test_tgis_launcher_sends_traces_under_tgis_name(tmp_path: Path, collector: Collector) -> None:
    arguments = ("--otlp-endpoint", collector.endpoint, "--json-output", "--port", "0")
    with launched(tmp_path, *arguments, ENGINE="scripted") as server:
        assert server.client.post("/generate", json=SHORT).status_code == 200
    assert collector.one("POST /generate").service == "text-generation-inference.router"
    assert not any("otlp" in line for line in server.told)


def test_the_name_that_tgi_is_given_is_passed_on() -> None:
    given = {"otlp_endpoint": "http://c:4317", "otlp_service_name": "mine"}
    found = translate(given, {}, Path("/nowhere"))
    text = " ".join(found.arguments)
    assert "--otlp-endpoint http://c:4317" in text
    assert "--otlp-service-name mine" in text
    assert found.ignored == ()
    assert "otlp" not in " ".join(translate({}, {}, Path("/nowhere")).arguments)


def test_an_endpoint_that_is_none_is_one_line() -> None:
    line = only_line(roundhouse("serve", *SCRIPTED, "--otlp-endpoint", "collector:4317"))
    assert "http://HOST:PORT" in line
    assert "'collector:4317'" in line
