"""What a service manager hears of each command: a real socket for datagrams, real processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards.service_manager import SOCKET, ServiceManager
from tests.system.server import STOP_S, children, end, serving
from tests.system.test_gateway import free_port

PATIENCE_S = 60.0
PORTS = ("--hostname", "127.0.0.1", "--port", "0")
SCRIPTED = ("--engine", "scripted")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the processes of a test say how they are."""
    with listening(str(tmp_path / "notify")) as manager:
        yield manager


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE_S)
        manager.bind(address)
        yield manager


def heard(manager: socket.socket) -> dict[str, str]:
    """The next piece of news, as names and values."""
    lines = manager.recv(4096).decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


@contextmanager
def started(
    manager: socket.socket, *arguments: str, module: str = "deploy.cli", **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """``roundhouse`` with these arguments, as a service of this manager."""
    env = {**os.environ, SOCKET: str(manager.getsockname()), **env}
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def stops(process: subprocess.Popen[bytes], manager: socket.socket) -> None:
    """Told to end, it says so before it does; what it has started says nothing."""
    process.send_signal(signal.SIGTERM)
    assert heard(manager)["STOPPING"] == "1"
    assert process.wait(STOP_S) == 0
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_serve_is_ready_when_it_serves(manager: socket.socket) -> None:
    with started(manager, "serve", "some/model", *PORTS, "--grpc-port", "0", *SCRIPTED) as process:
        news = heard(manager)
        assert news["READY"] == "1"
        assert news["STATUS"].startswith("serving some/model at http://127.0.0.1:")
        (worker,) = children(process.pid)
        if (environment := Path(f"/proc/{worker}/environ")).exists():
            assert SOCKET.encode() not in environment.read_bytes()  # it is not the service
        stops(process, manager)


def test_the_launcher_is_ready_when_it_serves(manager: socket.socket) -> None:
    """Also when it has warned of a flag before."""
    arguments = ("--model-id", "some/model", "--port", "0", "--speculate", "2")
    with started(manager, *arguments, module="deploy.tgi_launcher", ENGINE="scripted") as process:
        assert heard(manager)["READY"] == "1"
        stops(process, manager)


def test_a_worker_and_its_router_are_ready_one_after_the_other(
    manager: socket.socket, tmp_path: Path
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with listening(str(tmp_path / "router")) as routers:
        arguments = ("router", "--worker", listen, *PORTS, "--grpc-port", "0")
        with started(routers, *arguments) as router:
            with started(manager, "worker", *SCRIPTED, "--listen", listen) as worker:
                assert heard(manager) == {"READY": "1", "STATUS": f"at {listen}"}
                assert heard(routers)["READY"] == "1"
                stops(worker, manager)
            stops(router, routers)


def test_a_gateway_is_ready_when_it_is_attached(manager: socket.socket, tmp_path: Path) -> None:
    with serving(tmp_path, *SCRIPTED) as router:
        with started(manager, "gateway", "--router", router.grpc, *PORTS) as process:
            assert heard(manager)["STATUS"].startswith("http://127.0.0.1:")
            stops(process, manager)
        end(router.process)


def test_the_environment_names_a_manager_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOCKET, "/run/x")
    assert ServiceManager.taken().address == "/run/x"
    assert ServiceManager.taken().address == ""


def test_an_address_without_a_file() -> None:
    """Linux has such; where there are none, nothing may go wrong either."""
    name = f"roundhouse-{os.getpid()}"
    with listening(f"\0{name}" if sys.platform == "linux" else name) as manager:
        ServiceManager(f"@{name}").ready("here")
        assert sys.platform != "linux" or heard(manager) == {"READY": "1", "STATUS": "here"}


def test_a_manager_that_is_gone_is_no_fault(tmp_path: Path) -> None:
    ServiceManager(str(tmp_path / "nobody")).ready("alone")
    ServiceManager("").stopping()
