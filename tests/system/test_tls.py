"""Certificates on the command line: every command as a process, with the scripted engine."""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.service.certs import Authority, client_context, flags
from tests.system.server import (
    REQUEST_S,
    STOP_S,
    end,
    eventually,
    gateway,
    read_lines,
    ready,
    serving,
    start,
    start_router,
)
from tests.system.test_cli import only_line, roundhouse
from tests.system.test_gateway import free_port
from tls.files import Files

SCRIPTED = ("--engine", "scripted")
SHORT = {"inputs": "Count", "parameters": {"max_new_tokens": 8}}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUNDHOUSE_CONTROL", str(tmp_path / "control"))
    monkeypatch.delenv("PORT", raising=False)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


def answers(url: str, context: ssl.SSLContext | bool = True) -> bool:
    with httpx.Client(base_url=url, verify=context, timeout=REQUEST_S) as client:
        return client.post("/generate", json=SHORT).status_code == 200


@contextmanager
def worker(folder: Path, address: str, *arguments: str) -> Iterator[Callable[[], str]]:
    """``roundhouse worker`` that has loaded; gives what it has said so far."""
    log = folder / f"worker-{address.rpartition(':')[2]}"
    command = [sys.executable, "-m", "deploy.cli", "worker", *SCRIPTED, "--listen", address]
    with log.open("w") as errors:
        process = subprocess.Popen([*command, *arguments], stderr=errors)
        try:
            eventually(lambda: '"ready"' in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield log.read_text
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)


@contextmanager
def router(folder: Path, *arguments: str) -> Iterator[str]:
    """``roundhouse router`` that is ready; its base URL."""
    with (folder / "router").open("w") as errors:
        process = start_router(arguments, errors)
        try:
            yield ready(process, folder / "router")["rest"]
        finally:
            end(process)


def test_serve_speaks_https_and_ends_in_time(tmp_path: Path, ours: Authority) -> None:
    public = flags(ours.files("serve"), "tls")
    context = client_context(ours.ca, ours.files("client"))
    with serving(tmp_path, *SCRIPTED, *public) as server:
        assert server.rest.startswith("https://")
        assert answers(server.rest, context)
        with pytest.raises(httpx.TransportError):
            answers(server.rest, client_context(ours.ca))
        host, _, port = server.rest.removeprefix("https://").rpartition(":")
        # One that never answers that the connection ends.
        with socket.create_connection((host, int(port))) as plain:
            silent = context.wrap_socket(plain, server_hostname=host)
            silent.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert silent.recv(12) == b"HTTP/1.1 200"
            began = time.monotonic()
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            assert time.monotonic() - began < STOP_S / 2
            silent.close()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_what_a_person_is_shown_is_a_command_that_works(tmp_path: Path, ours: Authority) -> None:
    files, own = ours.files("serve"), ours.files("client")
    with (tmp_path / "stderr").open("w") as errors:
        given = {"TLS_CERT": files.cert, "TLS_KEY": files.key, "TLS_CLIENT_CA": files.ca}
        process = start(SCRIPTED, errors, **{name: str(path) for name, path in given.items()})
        try:
            lines = read_lines(process, lambda line: line.startswith("    -d "))
        finally:
            end(process)
    shown = "\n".join(lines)
    assert "REST  https://127.0.0.1:" in shown
    assert "curl -N https://127.0.0.1:" in shown
    assert "--cert YOUR_CERTIFICATE --key ITS_KEY" in shown
    assert own.cert.name not in shown


def test_a_cluster_speaks_by_certificates_alone(tmp_path: Path, ours: Authority) -> None:
    """Workers, a router whose groups change, and a gateway; each with a certificate of its own."""
    one, other, port = (f"127.0.0.1:{free_port()}" for _ in range(3))
    head = flags(ours.files("head"), "cluster")
    cluster_port = port.rpartition(":")[2]
    with (
        worker(tmp_path, one, *flags(ours.files("one"), "cluster")),
        worker(tmp_path, other, *flags(ours.files("other"), "cluster")),
        router(tmp_path, "--worker", one, *head, "--cluster-port", cluster_port) as rest,
    ):
        assert answers(rest)
        added = roundhouse("groups", "add", other, PORT=rest.rpartition(":")[2])
        assert added.returncode == 0, added.stderr
        shown = roundhouse("groups", "--json", PORT=rest.rpartition(":")[2])
        groups = json.loads(shown.stdout)["groups"]
        assert [group["state"] for group in groups] == ["up", "up"]
        own = flags(ours.files("web"), "cluster")
        public = flags(replace(ours.files("public"), ca=None), "tls")
        with gateway(tmp_path, port, *own, *public) as before:
            assert before.rest.startswith("https://")
            assert answers(before.rest, client_context(ours.ca))
        foreign = Authority(tmp_path, "theirs").files("web")
        line = only_line(
            roundhouse("gateway", "--router", port, "--port", "0", *flags(foreign, "cluster"))
        )
        assert "its certificate is not by the CA in --cluster-ca" in line
    # Nothing of gRPC's own is in between.
    for said in (tmp_path / "router").read_text().splitlines():
        json.loads(said)


def test_a_router_names_a_worker_that_it_cannot_believe(tmp_path: Path, ours: Authority) -> None:
    address = f"127.0.0.1:{free_port()}"
    foreign = Authority(tmp_path, "theirs").files("worker", ca=ours.ca)
    log = tmp_path / "router.log"
    arguments = ("--worker", address, *flags(ours.files("head"), "cluster"))
    with worker(tmp_path, address, *flags(foreign, "cluster")), log.open("w") as errors:
        process = start_router(arguments, errors)
        try:
            eventually(lambda: "is down" in log.read_text())
            ours.renew(foreign)  # no process needs to be started again
            ready(process, log)
        finally:
            end(process)
    (line,) = [one for one in log.read_text().splitlines() if "is down" in one]
    assert (
        f"{address}: its certificate is not by the CA in --cluster-ca"
        in json.loads(line)["message"]
    )


def test_a_worker_tells_of_files_that_replace_its_own_and_are_no_good(
    tmp_path: Path, ours: Authority
) -> None:
    address = f"127.0.0.1:{free_port()}"
    files = ours.files("worker")
    with worker(tmp_path, address, *flags(files, "cluster")) as said:
        assert "warning" not in said()
        shutil.copy(ours.files("another").key, files.key)
        head = flags(ours.files("head"), "cluster")
        with router(tmp_path, "--worker", address, *head) as rest:
            assert answers(rest)
        (line,) = [one for one in said().splitlines() if '"warning"' in one]
        assert "the former certificate stays in use" in json.loads(line)["message"]


@pytest.mark.parametrize("safe", [False, True])
def test_a_worker_that_anybody_can_reach_warns(tmp_path: Path, ours: Authority, safe: bool) -> None:
    address = f"0.0.0.0:{free_port()}"
    given = flags(ours.files("worker"), "cluster") if safe else ()
    with worker(tmp_path, address, *given) as said:
        lines = [json.loads(line)["message"] for line in said().splitlines() if '"warning"' in line]
    if safe:
        assert lines == []
        return
    (line,) = lines
    assert f"whoever reaches {address} can use this worker" in line
    assert "--cluster-ca, --cluster-cert and --cluster-key" in line


COMMANDS = {
    "serve": ("serve", *SCRIPTED),
    "router": ("router", "--worker", "127.0.0.1:1"),
    "gateway": ("gateway", "--router", "127.0.0.1:1"),
    "worker": ("worker", *SCRIPTED),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_cannot_be_used_are_one_line(
    tmp_path: Path, ours: Authority, command: str
) -> None:
    good, other = ours.files("good"), ours.files("other")
    kind = "cluster" if command == "worker" else "tls"
    wrong: list[tuple[Files, str]] = [
        (replace(good, key=tmp_path / "none"), "No such file or directory"),
        (replace(good, key=other.key), f"private key {other.key} is not that of {good.cert}"),
        (replace(good, ca=good.key), f"CA file {good.key} holds no certificate"),
    ]
    for files, told in wrong:
        assert told in only_line(roundhouse(*COMMANDS[command], *flags(files, kind)))
    half = roundhouse(*COMMANDS[command], "--cluster-cert", str(good.cert))
    line = only_line(half).replace("_", "-")
    assert "cluster-ca and" in line.replace("--", "")
    assert "cluster-key are missing" in line.replace("--", "")


def test_a_worker_itself_refuses_files_before_it_loads(tmp_path: Path, ours: Authority) -> None:
    """Its command has looked at them before; this is the program of an engine's environment."""
    files = replace(ours.files("worker"), key=tmp_path / "none")
    command = [sys.executable, "-m", "shards", *SCRIPTED, "--listen", "127.0.0.1:0"]
    for given, code in ((flags(files, "cluster"), 1), (["--cluster-ca", str(files.ca)], 2)):
        ended = subprocess.run(
            [*command, *given], capture_output=True, text=True, timeout=STOP_S, check=False
        )
        assert ended.returncode == code
        (line,) = ended.stderr.splitlines()
        assert json.loads(line)["event"] == "error"
