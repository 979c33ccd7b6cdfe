"""Groups whose workers are lost or hang: what is logged, and who hears of it."""

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router import link
from router.core.effects import Abandon
from router.core.events import GroupDown, GroupUp
from shards.v1 import shard_pb2
from tests.service.fakes import plan_for, until
from tests.service.test_group import PROMPT, Scene, scene_in


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with scene_in(tmp_path) as scene:
        yield scene


def count_attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of all attempts to connect from now on."""
    attempts, describe = list[str](), link.Link.describe

    async def counted(self: link.Link) -> shard_pb2.DescribeResponse:
        attempts.append(self.address)
        return await describe(self)

    monkeypatch.setattr(link.Link, "describe", counted)
    return attempts


async def test_of_a_worker_that_hangs_one_hears_once_it_has_not_answered_twice(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = scene.group(await scene.bench.start("a"))
    await scene.post.nth(GroupUp)
    scene.bench.gates["a"].clear()
    group.write(plan_for(1, 1, prompt=PROMPT))
    await until(lambda: scene.bench.engines["a"].begun)
    monkeypatch.setattr(link, "OPEN_DEADLINE_S", 0.2)
    group.abandon(Abandon("g", 1, "no answer to a plan"))
    await until(lambda: "not ready for a new stream" in caplog.text)
    assert scene.silent == []  # that step may only have been long
    await until(lambda: scene.silent)
    assert scene.silent == ["g"]
    scene.bench.gates["a"].set()
    monkeypatch.undo()
    assert (await scene.post.nth(GroupUp, 2)).epoch == 2
    assert caplog.text.count("group g is down") == 2


async def test_a_worker_that_starts_again_hangs_no_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, loaded = scene.bench, threading.Event()
    group = scene.group(await bench.start("a"))
    await scene.post.nth(GroupUp)
    group.abandon(Abandon("g", 1, "no answer to a plan"))
    await scene.post.nth(GroupUp, 2)
    await bench.kill("a")
    await scene.post.nth(GroupDown, 2)
    monkeypatch.setattr(link, "DESCRIBE_DEADLINE_S", 0.02)
    attempts = count_attempts(monkeypatch)
    await bench.start("a", load_after=loaded)
    await until(lambda: len(attempts) > 4)
    assert scene.silent == []
    monkeypatch.undo()
    loaded.set()
    await scene.post.nth(GroupUp, 3)


async def test_a_lost_worker_is_one_line_until_it_is_back(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = await scene.bench.start("a")
    left = Path(address.removeprefix("unix://"))
    scene.group(address)
    await scene.post.nth(GroupUp)
    attempts = count_attempts(monkeypatch)
    for life in (2, 3):
        caplog.clear()
        await scene.bench.kill("a")
        # What a killed process leaves, then nothing: grpc has other words for each.
        for change in (left.touch, left.unlink):
            change()
            seen = len(attempts)
            await until(lambda seen=seen: len(attempts) > seen + 1)
        await scene.bench.start("a")
        await scene.post.nth(GroupUp, life)
        assert caplog.text.count("group g is down") == 1, caplog.text


async def test_nobody_at_an_address_is_said_in_few_words(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.group("127.0.0.1:1")
    await until(lambda: "is down" in caplog.text)
    (line,) = caplog.messages
    assert line == (
        "group g is down: 127.0.0.1:1: nobody can be reached there (Connection refused)"
    )
