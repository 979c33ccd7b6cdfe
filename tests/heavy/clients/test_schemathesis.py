"""schemathesis: every operation of the OpenAPI document keeps to what the document says of it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.heavy.clients.conftest import python
from tests.heavy.clients.world import KEY
from tests.system.server import Server, gateway, serving

# Answers are short and take no time, so that time is spent on requests.
QUICK = ("--engine", "scripted", "--max-total-tokens", "64", "--api-key", KEY)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
EXAMPLES = 20
TIME_S = 50
KILL_S = 150


@pytest.fixture(scope="module")
def quick(way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, keys = tmp_path_factory.mktemp("quick"), ("--router-api-key", KEY, "--api-key", KEY)
    with serving(folder, *QUICK, python=python()) as server:
        if way == "router":
            yield server
            return
        with gateway(folder, server.grpc, *keys, python=python()) as before:
            yield before


def test_every_operation_keeps_to_the_document(quick: Server, tmp_path: Path) -> None:
    document = quick.client.get("/openapi.json").json()
    operations = {
        f"{verb.upper()} {path}" for path, verbs in document["paths"].items() for verb in verbs
    }
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{quick.rest}/openapi.json"]
    command += ["--header", f"authorization: Bearer {KEY}", "--checks", ",".join(CHECKS)]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES)]
    command += ["--seed", "1", "--generation-deterministic"]
    command += ["--max-time", str(TIME_S), "--continue-on-failure", "--no-color"]
    command += ["--report", "junit", "--report-junit-path", str(report)]
    ran = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=KILL_S
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2000:]
    cases = ET.parse(report).getroot().iter("testcase")
    assert {case.get("name") for case in cases} >= operations
    assert quick.client.get("/health").status_code == 200
