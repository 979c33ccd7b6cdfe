"""The alerts and the dashboard in a real Prometheus. Its programs are Debian's ``prometheus``."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.operations.test_monitoring import FOLDER, SHORT, lose_one, queries
from tests.system.server import end, eventually, gateway, serving
from tests.system.test_gateway import free_port

RULES = FOLDER / "prometheus"
# What TGI's own dashboard (assets/tgi_grafana.json of 3.3.7) asks for.
TGI = (
    *(
        f"histogram_quantile(0.5, sum by (le) (rate({name}_bucket{labels}[1m])))"
        for name, labels in (
            ("tgi_request_duration", ""),
            ("tgi_request_generated_tokens", ""),
            ("tgi_request_input_length", ""),
            ("tgi_request_mean_time_per_token_duration", ""),
            ("tgi_request_queue_duration", ""),
            ("tgi_request_skipped_tokens", ""),
            ("tgi_batch_inference_duration", '{method="prefill"}'),
            *(
                (f"tgi_batch_{part}_duration", '{method="decode"}')
                for part in ("inference", "forward", "decode", "filter", "concat")
            ),
        )
    ),
    "avg(tgi_batch_current_max_tokens)",
    "avg(tgi_batch_current_size)",
    "count(tgi_request_count)",
    "sum(increase(tgi_batch_concat[1m])) by (reason)",
    "sum(increase(tgi_request_failure[1m])) by (err)",
    "sum(increase(tgi_request_success[1m]))",
    "sum(rate(tgi_request_generated_tokens_sum[1m])"
    " / rate(tgi_request_generated_tokens_count[1m]))",
    "sum(tgi_queue_size)",
)  # fmt: skip


def program(name: str) -> str:
    """The path of a program that these tests are about."""
    found = shutil.which(name)
    assert found, f"{name} is missing: apt-get install prometheus"
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "prometheus.yaml"),
        ("test", "rules", "alerts_test.yaml"),
    ],
)
def test_promtool_is_content(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [program("promtool"), *command], cwd=RULES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus that has scraped a router and its gateway, with traffic and a loss."""
    folder = tmp_path_factory.mktemp("prometheus")
    groups = [("--group", f"scripted,name={name},engine-option=step_ms=5") for name in "ab"]
    with (
        serving(folder, *(text for group in groups for text in group)) as server,
        gateway(folder, server.grpc) as before,
    ):
        targets = [one.rest.removeprefix("http://") for one in (server, before)]
        process, url = prometheus(folder, targets)
        try:
            with httpx.Client(base_url=url, timeout=10) as client:
                eventually(lambda: scraped(client) >= 3)
                for one in (server, before):
                    assert one.client.post("/generate", json=SHORT).status_code == 200
                    assert one.client.post("/generate", json={"inputs": ""}).status_code == 422
                lose_one(server)
                seen = scraped(client)
                eventually(lambda: scraped(client) >= seen + 3)
                yield client
        finally:
            end(process)


def prometheus(folder: Path, targets: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Starts it with the rules and two targets; returns its process and its URL."""
    jobs = zip(("roundhouse", "roundhouse-gateway"), targets, strict=True)
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "alerts.yaml")],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [target]}]} for name, target in jobs
        ],
    }
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        *(program("prometheus"), f"--config.file={path}", f"--web.listen-address=127.0.0.1:{port}"),
        f"--storage.tsdb.path={folder / 'tsdb'}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{port}"


def scraped(client: httpx.Client) -> float:
    """How often every target has answered, at least."""
    try:
        if client.get("/-/ready").status_code != 200:
            return 0
    except httpx.TransportError:
        return 0  # it starts
    found = ask(client, 'min(count_over_time(up{job=~"roundhouse.*"}[10m]) * up)')
    return float(found[0]["value"][1]) if found else 0


def ask(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """The series that an expression has now."""
    answer = client.get("/api/v1/query", params={"query": expression, "time": time.time()})
    said = answer.json()
    assert said["status"] == "success", (expression, said)
    found: list[dict[str, Any]] = said["data"]["result"]
    return found


def test_each_panel_has_data(asked: httpx.Client) -> None:
    for expression, _ in queries():
        for variable, value in {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}.items():
            expression = expression.replace(variable, value)
        found = ask(asked, expression)
        # A group without a step has no quantile of it.
        assert any(one["value"][1] != "NaN" for one in found), expression


def test_the_dashboard_of_tgi_has_data(asked: httpx.Client) -> None:
    for expression in TGI:
        assert ask(asked, expression), expression


def test_prometheus_has_loaded_every_alert_and_none_fires_unfounded(asked: httpx.Client) -> None:
    rules = asked.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}, json.dumps(rules)
    assert not [rule["name"] for rule in rules if rule["state"] == "firing"]
