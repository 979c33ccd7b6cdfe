"""A server that is started where few files may be open serves more connections than that."""

import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.system.server import gateway, serving

FEW = 128
ASKED = {"inputs": "Count", "parameters": {"max_new_tokens": 2}}


@contextmanager
def few_files() -> Iterator[None]:
    """What is started inside may open as few, until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def idle(stack: ExitStack, url: str) -> None:
    """Opens twice as many connections as few files are."""
    address = httpx.URL(url)
    for _ in range(2 * FEW):
        stack.enter_context(socket.create_connection((address.host, address.port)))


@pytest.mark.parametrize("kind", ["router", "gateway"])
def test_idle_connections_leave_room_for_requests(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        with few_files():
            front = stack.enter_context(serving(tmp_path, "--engine", "scripted"))
            if kind == "gateway":
                front = stack.enter_context(gateway(tmp_path, front.grpc))
        idle(stack, front.rest)
        assert httpx.post(f"{front.rest}/generate", json=ASKED).status_code == 200
        shown = httpx.get(f"{front.rest}/metrics").text
        files = re.search(r"^process_open_fds (\S+)$", shown, re.MULTILINE)
        limit = re.search(r"^process_max_fds (\S+)$", shown, re.MULTILINE)
        assert files is not None
        assert limit is not None
        assert 2 * FEW < float(files[1]) < float(limit[1])
