"""One server for all clients, and a wall: whatever a client asks for beside it is refused.

These tests run in environments without Roundhouse, so the server is a process of the project's own
interpreter. It asks for a key, which every client must be able to send in its own way. Clients of
REST reach it in two ways: at the router itself, and at a gateway process before it. Tests that are
marked ``both_ways`` run on both; ``--gateway`` sends all the others through the gateway as well.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.heavy.clients.world import KEY, PYTHON, SERVER
from tests.system.server import Server, gateway, serving

_connect = socket.socket.connect
_resolve = socket.getaddrinfo
wanted: list[str] = []
"""Hosts that clients have asked for since somebody looked."""

# litellm's list of prices, which it would fetch when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
for _name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.lower(), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "run all tests of REST through a gateway process, and at the router itself none"
    parser.addoption("--gateway", action="store_true", help=told)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The ways on which a test's client reaches the server."""
    if "way" in metafunc.fixturenames:
        ways = ["router", "gateway"]
        if metafunc.config.getoption("--gateway"):
            ways = ["gateway"]
        elif metafunc.definition.get_closest_marker("both_ways") is None:
            ways = ["router"]
        metafunc.parametrize("way", ways, scope="session")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are no errors here: what a client's own code is warned of is its makers' affair.

    The wall stands from now on, so that what clients do when they are imported counts too.
    """
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("markers", "both_ways: runs at the router and through a gateway")
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", only_here)
    patch.setattr(socket, "getaddrinfo", resolve_here)
    config.add_cleanup(patch.undo)


def only_here(self: socket.socket, address: Any) -> None:
    """Connects to this machine; anything else is a client that phones home."""
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            wanted.append(host)
            raise PermissionError(f"a client wants to talk to {host}")
    _connect(self, address)


def resolve_here(host: Any, *arguments: Any, **options: Any) -> Any:
    """Resolves the names of this machine alone, so that no name is asked for elsewhere."""
    known = host.decode() if isinstance(host, bytes) else host
    if known not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
        wanted.append(known)
        raise PermissionError(f"a client wants to know where {known} is")
    return _resolve(host, *arguments, **options)


@pytest.fixture(autouse=True)
def asked() -> Iterator[list[str]]:
    """The hosts that were refused: a failure, even if the client has swallowed the refusal."""
    yield wanted
    found, wanted[:] = list(wanted), []
    assert found == []


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model of 135M parameters, on llama.cpp: gRPC, and its own REST."""
    with serving(tmp_path_factory.mktemp("router"), *SERVER, python=python()) as router:
        router.client.headers["authorization"] = f"Bearer {KEY}"
        yield router


@pytest.fixture(scope="session")
def server(router: Server, way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What clients of REST talk to: the router, or a gateway that asks the same of them."""
    if way == "router":
        yield router
        return
    keys = ("--router-api-key", KEY, "--api-key", KEY)
    with gateway(tmp_path_factory.mktemp("gateway"), router.grpc, *keys, python=python()) as before:
        before.client.headers["authorization"] = f"Bearer {KEY}"
        before.model = router.model
        yield before


def python() -> str:
    """The interpreter that has Roundhouse."""
    found = Path(os.environ.get("ROUNDHOUSE_PYTHON", PYTHON))
    assert found.is_file(), f"{found} is missing: run 'make setup'"
    return str(found)
