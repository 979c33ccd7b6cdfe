"""``python -m router``: the options of ``roundhouse router`` without the rest of that command."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from router.__main__ import _parser
from router.config import Settings
from router.options import KNOBS, settings_from
from tests.service.certs import Authority, client_context, flags
from tests.system.server import STOP_S, end, eventually
from tests.system.test_gateway import free_port
from tests.system.test_tls import answers, ours, worker

__all__ = ["ours"]

WORKER = ("--worker", "127.0.0.1:1")
GIVEN = {
    "step-deadline": (7.5, "7.5"),
    "resume-streams": (False, ""),
    "json-output": (True, ""),
    "cors-allow-origin": (("http://a", "http://b"), "http://a,http://b"),
    "api-key": ("77", "77"),
    "cluster-port": (50055, "50055"),
    "log-level": ("error", "error"),
}


def settings_of(*arguments: str) -> Settings:
    return settings_from(vars(_parser().parse_args([*WORKER, *arguments])))


def test_without_options_every_setting_has_its_own_default() -> None:
    assert settings_of() == Settings()


def test_every_option_fills_its_setting(ours: Authority) -> None:
    given = dict(GIVEN)
    for kind, prefix in (("tls", "public"), ("cluster", "head")):
        words = flags(ours.files(prefix), kind)
        given |= {
            name.removeprefix("--"): (value, value)
            for name, value in zip(words[::2], words[1::2], strict=True)
        }
    words = list[str]()
    for name, (value, text) in given.items():
        words += [f"--no-{name}" if value is False else f"--{name}", *filter(None, [text])]
    settings = settings_of(*words)
    fields = {knob.name: knob.setting for knob in KNOBS}
    assert {name: getattr(settings, fields[name]) for name in given} == {
        name: value for name, (value, _) in given.items()
    }


def test_it_speaks_tls_with_clients_and_workers(tmp_path: Path, ours: Authority) -> None:
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "router.log"
    public, head = flags(ours.files("public"), "tls"), flags(ours.files("head"), "cluster")
    ports = ("--hostname", "127.0.0.1", "--port", "0", "--grpc-port", "0")
    command = [sys.executable, "-m", "router", "--worker", address, *ports, *public, *head]
    own = client_context(ours.ca, ours.files("client"))
    with (
        worker(tmp_path, address, *flags(ours.files("worker"), "cluster")),
        log.open("w") as errors,
    ):
        process = subprocess.Popen(command, stderr=errors)
        try:
            eventually(lambda: "ready: REST" in log.read_text())
            found = re.search(r"REST on port (\d+)", log.read_text())
            assert found is not None
            assert answers(f"https://127.0.0.1:{found[1]}", own)
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0
        finally:
            end(process)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--tls-cert", "x.pem"), "tls_cert and tls_key go together: tls_key is missing"),
        (("--tls-cert", "none.pem", "--tls-key", "none.key"), "none.pem"),
        (("--cluster-port", "1"), "cluster_port needs cluster_ca, cluster_cert and cluster_key"),
    ],
)
def test_what_cannot_work_is_one_line(words: tuple[str, ...], told: str) -> None:
    command = [sys.executable, "-m", "router", *WORKER, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: ")
    assert told in line
