"""One server for all clients, and a wall: whatever a client asks for beside it is refused.

These tests run in environments without Roundhouse, so the server is a process of the project's own
interpreter. It asks for a key, which every client must be able to send in its own way. Clients of
REST reach it in two ways: at the router itself, and at a gateway process before it. Tests that are
marked ``both_ways`` run on both; ``--gateway`` sends all the others through the gateway as well.

The server has a real model, whose last digits depend on where in its cache a sequence lies. Tests
that compare two answers of it may ask only what it is sure of; all others are marked ``repeatable``
and meet the scripted engine, whose answers depend on the prompt and the seed alone.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.heavy.clients.world import KEY, MODEL, PYTHON, SCRIPT
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
    told = "repeatable: compares two answers, so it runs on the engine that gives equal ones"
    config.addinivalue_line("markers", told)
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
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model of 135M parameters, on llama.cpp: gRPC, and its own REST."""
    yield from keyed(serving(tmp_path_factory.mktemp("model"), *MODEL, python=python()))


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same faces before an engine without a model, which never gives two answers to one ask."""
    yield from keyed(serving(tmp_path_factory.mktemp("script"), *SCRIPT, python=python()))


@pytest.fixture(scope="session")
def modelled_gateway(
    modelled: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A gateway that asks the router with the model."""
    yield from keyed(before(modelled, tmp_path_factory.mktemp("gateway")))


@pytest.fixture(scope="session")
def scripted_gateway(
    scripted: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A gateway that asks the router without one."""
    yield from keyed(before(scripted, tmp_path_factory.mktemp("gateway")))


@pytest.fixture
def router(request: pytest.FixtureRequest) -> Server:
    """The router that a test is to meet: with the model, or if it compares answers without."""
    found: Server = request.getfixturevalue(engine_of(request))
    return found


@pytest.fixture
def server(request: pytest.FixtureRequest, way: str) -> Server:
    """What clients of REST talk to: the router, or a gateway that asks the same of them."""
    name = engine_of(request)
    found: Server = request.getfixturevalue(name if way == "router" else f"{name}_gateway")
    return found


def engine_of(request: pytest.FixtureRequest) -> str:
    return "scripted" if request.node.get_closest_marker("repeatable") else "modelled"


@contextmanager
def before(router: Server, folder: Path) -> Iterator[Server]:
    """A gateway, of the same model as the router behind it."""
    keys = ("--router-api-key", KEY, "--api-key", KEY)
    with gateway(folder, router.grpc, *keys, python=python()) as found:
        found.model = router.model
        yield found


def keyed(started: AbstractContextManager[Server]) -> Iterator[Server]:
    """A server whose own client sends the key."""
    with started as server:
        server.client.headers["authorization"] = f"Bearer {KEY}"
        yield server


def python() -> str:
    """The interpreter that has Roundhouse."""
    found = Path(os.environ.get("ROUNDHOUSE_PYTHON", PYTHON))
    assert found.is_file(), f"{found} is missing: run 'make setup'"
    return str(found)
