"""The dashboard and the alerts, against what servers that run really show."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.operations.dashboard import COLUMNS, dashboard
from tests.operations.promql import ADDED, Shown, faults, shown, uses
from tests.system.server import Server, children, eventually, gateway, serving

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "operations"
COMMITTED = FOLDER / "grafana" / "roundhouse.json"
LONG = {"inputs": "Count", "parameters": {"max_new_tokens": 400}}
BUSY = r"roundhouse_kv_tokens_used{.*} [1-9]"
SHORT = {"inputs": "Count", "parameters": {"max_new_tokens": 4}}


def alerts() -> list[dict[str, Any]]:
    """The rules, as Prometheus reads them."""
    found = yaml.safe_load((FOLDER / "prometheus" / "alerts.yaml").read_text())
    rules: list[dict[str, Any]] = [rule for group in found["groups"] for rule in group["rules"]]
    return rules


def panels() -> list[dict[str, Any]]:
    """All panels but the headings of rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Every expression of the dashboard, with what its series are called."""
    return [(one["expr"], one["legendFormat"]) for panel in panels() for one in panel["targets"]]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """What a router and its gateway show when one of two groups was lost under a stream."""
    folder = tmp_path_factory.mktemp("scraped")
    groups = [("--group", f"scripted,name={name},engine-option=step_ms=5") for name in "ab"]
    with (
        serving(folder, *(text for group in groups for text in group)) as server,
        gateway(folder, server.grpc) as before,
    ):
        assert before.client.post("/generate", json=SHORT).status_code == 200
        lose_one(server)
        pages = [one.client.get("/metrics").text for one in (server, before)]
        assert "roundhouse_gateway_attached 1.0" in pages[1]
        yield shown(*pages)


def lose_one(server: Server) -> None:
    """Kills one of two groups that answer; its stream goes on in the other one."""
    with ExitStack() as open_streams:
        streams = []
        for prompt in ("Count", "Tell"):
            answer = server.client.stream(
                "POST", "/generate_stream", json=LONG | {"inputs": prompt}
            )
            lines = open_streams.enter_context(answer).iter_lines()
            streams.append(line for line in lines if line)
            next(streams[-1])
        eventually(lambda: len(re.findall(BUSY, server.client.get("/metrics").text)) == 2)
        os.kill(children(server.process.pid)[0], signal.SIGKILL)
        for stream in streams:
            assert '"generated_text":"' in list(stream)[-1]


def test_the_dashboard_names_only_what_there_is(scraped: Shown) -> None:
    for expression, legend in queries():
        assert not list(faults(expression, scraped)), expression
        named = set(re.findall(r"{{(\w+)}}", legend))
        assert all(named <= use.labels for use in uses(expression)), (expression, legend)
    for variable in dashboard()["templating"]["list"][1:]:
        asked = re.fullmatch(r"label_values\((\w+)({.*})?, (\w+)\)", variable["query"]["query"])
        assert asked is not None
        assert asked[1] in scraped
        assert asked[3] == variable["name"]
        assert asked[3] in ADDED


def test_the_alerts_name_only_what_there_is(scraped: Shown) -> None:
    for rule in alerts():
        assert not list(faults(rule["expr"], scraped)), rule["alert"]
        for use in uses(rule["expr"])[:1]:  # whose labels the alert has
            known = use.labels if " by " in rule["expr"] else scraped.get(use.metric, {}).keys()
            named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            assert named <= {*known, *ADDED}, rule["alert"]


def test_what_matters_is_on_the_dashboard(scraped: Shown) -> None:
    """A metric of ours that is new must be shown, or be named here with the reason."""
    named = {use.metric for expression, _ in queries() for use in uses(expression)}
    ours = {name for name in scraped if name.startswith("roundhouse_")}
    assert ours - named == {
        *(f"roundhouse_{name}_sum" for name in HISTOGRAMS),  # quantiles are shown, not means
        "roundhouse_step_seconds_count",
        "roundhouse_generated_tokens_total",  # of ended requests: tokens are shown as they come
    }


HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds", "step_seconds")


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        (
            "rate(roundhouse_preemption_total[5m])",
            "no metric is called roundhouse_preemption_total",
        ),
        ("sum by (node) (tgi_queue_size)", "tgi_queue_size has no label node"),
        ('tgi_request_failure{kind="x"}', "tgi_request_failure has no label kind"),
        ('tgi_request_failure{err=~"dropped|lost"}', "tgi_request_failure has no err that is lost"),
        ("tgi_queue_size / on (pod) tgi_queue_size", "tgi_queue_size has no label pod"),
    ],
)
def test_what_has_been_renamed_is_found(expression: str, fault: str, scraped: Shown) -> None:
    assert fault in set(faults(expression, scraped))


def test_the_committed_dashboard_is_what_its_source_makes() -> None:
    assert json.loads(COMMITTED.read_text()) == dashboard(), "make dashboard"


def test_panels_fill_their_rows_and_say_what_to_do() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
    deep = max(y for _, y in taken) + 1
    assert len(taken) == COLUMNS * deep  # no hole, nothing beyond the edge
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
    for panel in panels():
        assert len(panel["description"]) > 40, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_each_alert_has_a_line_in_the_runbook_and_cases() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(Roundhouse\w+)` \|", section, flags=re.MULTILINE)
    assert listed == [rule["alert"] for rule in alerts()]
    cases = yaml.safe_load((FOLDER / "prometheus" / "alerts_test.yaml").read_text())
    fired = {
        case["alertname"]
        for test in cases["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == set(listed)
    for rule in alerts():
        assert rule["annotations"]["runbook"] == "docs/operations.md#alerts"
        assert rule["labels"]["severity"] in ("critical", "warning")
