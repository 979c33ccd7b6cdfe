"""``roundhouse switch`` from one real engine to another while streams run."""

from pathlib import Path

import pytest

from deploy.interpreters import installed_apart
from tests.heavy.models import smollm2_folder
from tests.system.server import serving
from tests.system.test_switch import STREAMS, change, completed, names, streaming

TOKENS = 400


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUNDHOUSE_CONTROL", str(tmp_path / "control"))


def test_streams_of_llamacpp_go_on_in_torch(tmp_path: Path) -> None:
    """No token is lost, and none is said twice: each stream has as many as it asked for."""
    assert installed_apart("torch"), "roundhouse engines install torch"
    asked = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    bodies = [asked | {"prompt": f"{number} ways to bake bread"} for number in range(STREAMS)]
    with serving(tmp_path, "--group", "llamacpp,threads=1") as server:
        with streaming(server, bodies, completed) as streams:
            done = change(server, "switch", f"torch,threads=1,model={smollm2_folder()}")
            assert done.returncode == 0, done.stderr
            assert streams.tokens() == [[TOKENS]] * STREAMS
        assert names(server) == ["torch"]
        seen = server.client.get("/metrics").text
        moved = 'roundhouse_continuations_total{from_engine="llamacpp",to_engine="torch"}'
        assert f"{moved} {STREAMS}.0" in seen
