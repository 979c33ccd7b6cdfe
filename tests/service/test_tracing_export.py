"""Traces that are off, sampled, or hard to get rid of: what serves is not held up by any of it."""

import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from router.config import ConfigError, Settings
from router.tracing import OFF, tracing_of
from router.tracing_export import _LINES, LINE_EVERY_S
from tests.service.collector import CALLER, TRACE, Collector
from tests.service.fakes import until
from tests.service.gateways import gateway_before
from tests.service.test_rest_router import House, house_in

PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
ASK = {"inputs": "hello", "parameters": {"max_new_tokens": 6}}
NOBODY = "http://127.0.0.1:9"


@asynccontextmanager
async def traced(folder: Path, endpoint: str, **more: Any) -> AsyncIterator[House]:
    async with house_in(folder, otlp_endpoint=endpoint, **more) as house:
        yield house


def calls_of(house: House, tokens: int, counts: list[Counter[str]]) -> Any:
    """A request during which the calls into what traces are counted, by name."""

    async def ask() -> None:
        seen: Counter[str] = Counter()

        def profile(frame: Any, event: str, _: Any) -> None:
            code = frame.f_code
            if event == "call" and "router/tracing" in code.co_filename:
                seen[code.co_qualname] += 1

        body = {"inputs": "x", "parameters": {"max_new_tokens": tokens}}
        sys.setprofile(profile)
        try:
            async with house.client.stream("POST", "/generate_stream", json=body) as answer:
                assert len([line async for line in answer.aiter_lines() if line]) == tokens
            await until(house.idle)
        finally:
            sys.setprofile(None)
        counts.append(seen)

    return ask()


@pytest.mark.parametrize("on", [True, False])
async def test_nothing_is_done_for_a_token(tmp_path: Path, collector: Collector, on: bool) -> None:
    counts: list[Counter[str]] = []
    async with house_in(tmp_path, otlp_endpoint=collector.endpoint if on else None) as house:
        for tokens in (5, 205):
            await calls_of(house, tokens, counts)
    few, many = counts
    assert few["AnswerSpan.ended" if on else "Answer.ended"] == 1
    assert few == many


async def test_log_lines_have_the_trace(
    tmp_path: Path, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "router.journal")
    async with traced(tmp_path, collector.endpoint) as house:
        await house.client.post("/generate", json=ASK, headers=PARENT)
        await house.client.post("/generate", json={"inputs": ""}, headers=PARENT)
        await house.client.post("/generate", json=ASK)
    told = [r.__dict__["fields"]["trace_id"] for r in caplog.records if r.name == "router.journal"]
    assert told[:2] == [TRACE, TRACE]
    assert told[2] in {span.trace for span in collector.spans} - {TRACE}


async def test_without_a_collector_nobody_reads_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "router.journal")
    async with house_in(tmp_path) as house:
        await house.client.post("/generate", json=ASK, headers=PARENT)
    (record,) = [one for one in caplog.records if one.name == "router.journal"]
    assert "trace_id" not in record.__dict__["fields"]


@pytest.mark.parametrize("who", ["sampler", "caller"])
async def test_who_samples_nothing_gets_nothing_but_the_log_line(
    tmp_path: Path,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    who: str,
) -> None:
    headers = dict(PARENT)
    if who == "sampler":
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    else:
        headers["traceparent"] = headers["traceparent"].removesuffix("1") + "0"
    caplog.set_level(logging.INFO, "router.journal")
    async with (
        traced(tmp_path, collector.endpoint) as house,
        gateway_before(house.grpc, otlp_endpoint=collector.endpoint) as (_, port),
    ):
        for url in (house.url, f"http://127.0.0.1:{port}"):
            answer = await house.client.post(f"{url}/generate", json=ASK, headers=headers)
            assert answer.status_code == 200
    assert collector.sent == []
    told = [one for one in caplog.records if one.name == "router.journal"]
    assert [one.__dict__["fields"]["trace_id"] for one in told] == [TRACE, TRACE]


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that a log would have of traces. (pytest hears the library by itself.)"""
    assert not logging.getLogger("opentelemetry").propagate
    records = [one for one in caplog.records if not one.name.startswith("opentelemetry")]
    return [
        f"{one.levelname} {one.getMessage()}" for one in records if "traces" in one.getMessage()
    ]


async def test_a_collector_that_cannot_be_reached_costs_a_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("router.tracing_export.FLUSH_S", 0.3)
    monkeypatch.setattr(_LINES, "_next_s", 0.0)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    async with traced(tmp_path, NOBODY) as house:
        for _ in range(5):
            assert (await house.post("/generate", ASK)).status_code == 200
        await until(lambda: any("traces" in one.getMessage() for one in caplog.records))
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 5
    (line,) = ours(caplog)
    assert line.startswith("WARNING traces: ")
    assert "UNAVAILABLE" in line


async def test_a_collector_that_does_not_answer_holds_up_the_end_no_longer_than_said(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.tracing_export.FLUSH_S", 0.3)
    collector.let.clear()
    async with traced(tmp_path, collector.endpoint) as house:
        assert (await house.post("/generate", ASK)).status_code == 200
        began_s = time.monotonic()
    assert collector.asked.is_set()
    assert time.monotonic() - began_s < 5


async def test_more_spans_than_may_wait_are_dropped(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("QUEUE_SIZE", "4"), ("EXPORT_BATCH_SIZE", "2")):
        monkeypatch.setenv(f"OTEL_BSP_MAX_{name}", value)
    collector.let.clear()
    async with traced(tmp_path, collector.endpoint) as house:
        for _ in range(6):
            assert (await house.post("/generate", ASK)).status_code == 200
        collector.let.set()
    assert 0 < len(collector.spans) < 6 * 6


def test_the_library_is_heard_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(_LINES, "_next_s", 0.0)
    theirs = logging.getLogger("opentelemetry.somewhere")
    tracing_of(Settings(otlp_endpoint=NOBODY), lambda: 0)
    for _ in range(50):
        theirs.error("cannot\nTraceback")
    now_s += LINE_EVERY_S
    theirs.warning("still not")
    theirs.info("never")
    assert ours(caplog) == ["WARNING traces: cannot", "WARNING traces: still not"]


class _Http(HTTPServer):
    """A collector of the protocol over HTTP, which keeps paths and bodies."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Http

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def http_collector() -> Iterator[_Http]:
    server = _Http()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("by", ["option", "variable"])
async def test_spans_go_over_http_if_opentelemetrys_variable_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with http_collector() as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        if by == "variable":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        async with house_in(tmp_path, otlp_endpoint=endpoint if by == "option" else None) as house:
            await house.post("/generate", ASK)
    (path, body), *_ = server.got
    assert path == "/v1/traces"
    assert b"POST /generate" in body


async def test_opentelemetrys_variables_say_where_and_who(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    async with house_in(tmp_path) as house, gateway_before(house.grpc) as (_, port):
        await house.client.post(f"http://127.0.0.1:{port}/generate", json=ASK)
    assert {span.service for span in collector.spans} == {"mine"}


async def test_the_option_says_who_before_any_variable(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    async with traced(tmp_path, collector.endpoint, otlp_service_name="ours") as house:
        await house.post("/generate", ASK)
    assert {span.service for span in collector.spans} == {"ours"}


@pytest.mark.parametrize("variable", [("SDK_DISABLED", "true"), ("TRACES_EXPORTER", "none")])
def test_variables_can_turn_it_off(
    monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)
    monkeypatch.setenv(f"OTEL_{variable[0]}", variable[1])
    assert tracing_of(Settings(), lambda: 0) is OFF


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        tracing_of(Settings(**settings), lambda: 0)
    (line,) = caught.value.faults
    assert "\n" not in line
    return line


def test_what_a_user_can_get_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "http://HOST:PORT" in refusal(otlp_endpoint="localhost:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    assert "soon" in refusal(otlp_endpoint=NOBODY)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "pigeon")
    assert "grpc or http/protobuf, not 'pigeon'" in refusal(otlp_endpoint=NOBODY)


@pytest.mark.parametrize(
    ("protocol", "module", "package"),
    [
        ("grpc", "grpc", "opentelemetry-exporter-otlp-proto-grpc"),
        ("http/protobuf", "http", "opentelemetry-exporter-otlp-proto-http"),
    ],
)
def test_packages_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, protocol: str, module: str, package: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setitem(sys.modules, f"opentelemetry.exporter.otlp.proto.{module}", None)
    assert package in refusal(otlp_endpoint=NOBODY)


def test_a_process_without_traces_loads_nothing_of_them() -> None:
    code = (
        "import router.app, router.gateway, sys; "
        "print(*(name for name in sys.modules if name.startswith('opentelemetry.sdk')"
        " or name.startswith('opentelemetry.exporter')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
