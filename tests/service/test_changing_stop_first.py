"""A new group in the place of former ones that are ended first, as their device must be free."""

import asyncio

import pytest

from router import group_steps
from router.change import Problem
from tests.service.change_rig import leave, over, rig_of
from tests.service.fakes import until

IMPOSSIBLE = Problem.IMPOSSIBLE


async def test_the_former_groups_may_be_ended_first() -> None:
    async with rig_of("a", "b") as rig:
        rig.workers.loading.clear()
        switch = asyncio.create_task(rig.changes.switch("new", True, 0, rig.tell))
        await until(lambda: rig.workers.began)
        assert rig.workers.running == {"new"}, "the device is free for it"
        assert rig.groups.names() == ("a", "b"), "requests for their model wait"
        assert rig.groups.up() == []
        assert rig.groups.coming, "the server is healthy"
        rig.workers.loading.set()
        await switch
        assert not rig.groups.coming
        assert rig.serving == (["new"], ["new"])
        assert rig.groups.names() == ("new",)
        assert rig.lines[0] == "ending a, b; requests wait"
        assert rig.lines[-1] == "new serves m in the place of: a, b"


async def test_the_new_group_may_have_the_name_of_a_former_one() -> None:
    async with rig_of("a", "b") as rig:
        await rig.changes.switch("a", True, 0, rig.tell)
        assert rig.serving == (["a"], ["a"])
        assert rig.groups.names() == ("a",)
        rig.groups.refusals["a"] = "another vocabulary"
        change = rig.changes.switch("a", True, 0, rig.tell)
        assert "a has not come back: a cannot serve" in await rig.refused(IMPOSSIBLE, change)
        assert rig.groups.names() == ()
        assert rig.workers.running == set()


async def test_workers_elsewhere_cannot_be_ended_first() -> None:
    async with rig_of("a") as rig:
        rig.workers.ends_them = False
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0, rig.tell))
        assert line.startswith("the workers of this router run elsewhere")
        assert rig.serving == (["a"], ["a"])
        assert rig.groups.removals == []


async def test_groups_of_several_models_cannot_be_ended_first() -> None:
    async with rig_of("a") as rig:
        rig.groups.serve("other")
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0, rig.tell))
        assert line.startswith("there are several models, m, n")
        assert rig.groups.removals == []


@pytest.mark.parametrize("failing", ["start", "connect", "limit", "model", "bug"])
async def test_the_former_groups_are_started_again_if_the_new_one_cannot_serve(
    failing: str,
) -> None:
    async with rig_of("a", "b") as rig:
        limit_s, text, why = 0.0, "new", "no room"
        match failing:
            case "start":
                rig.workers.start_errors["new"] = why
            case "connect":
                rig.groups.refusals["new"] = why
            case "limit":
                rig.workers.loading.clear()
                limit_s, why = 0.01, "within 0.01 s"
                asyncio.get_running_loop().call_later(0.02, rig.workers.loading.set)
            case "model":
                text, why = "other", "other serves n, and no other group does"
            case _:
                rig.groups.broken, why = "new", "the router failed; its log says why"
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch(text, True, limit_s, rig.tell))
        assert why in line
        assert line.endswith("; the former groups serve again: a, b")
        assert rig.serving == (["a", "b"], ["a", "b"])
        assert "starting the former groups again: a, b" in rig.lines


async def test_what_is_not_downloaded_in_time_ends_nobody() -> None:
    async with rig_of("a", "b") as rig:
        rig.workers.downloaded.clear()
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0.01, rig.tell))
        assert line.startswith("new did not serve within 0.01 s: its files were not here")
        assert rig.groups.removals == []
        assert rig.serving == (["a", "b"], ["a", "b"])


async def test_a_former_group_that_does_not_come_back_is_told() -> None:
    async with rig_of("a", "b") as rig:
        rig.workers.start_errors["new"] = "no room"
        rig.workers.again_errors["b"] = "its device has gone"
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0, rig.tell))
        assert line == (
            "no room; the former groups serve again: a; b has not come back: its device has gone"
        )
        assert rig.serving == (["a"], ["a"])
        assert rig.groups.names() == ("a",)


async def test_a_former_group_that_does_not_serve_in_time_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_steps, "COME_BACK_S", 0.01)
    async with rig_of("a") as rig:
        rig.workers.start_errors["new"] = "no room"
        rig.groups.connecting.clear()
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0, rig.tell))
        assert line == "no room; a has not come back: it took more than 0.01 s"
        assert rig.serving == ([], [])


async def test_after_nothing_has_come_back_a_group_can_be_put_there() -> None:
    async with rig_of("a") as rig:
        rig.workers.start_errors["new"] = "no room"
        rig.workers.again_errors["a"] = "its device has gone"
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0, rig.tell))
        assert line == "no room; a has not come back: its device has gone"
        rig.workers.start_errors.clear()
        await rig.changes.switch("new", True, 0, rig.tell)
        assert rig.serving == (["new"], ["new"])


async def test_a_caller_who_leaves_before_the_new_group_serves_gets_the_former_ones_back() -> None:
    async with rig_of("a", "b") as rig:
        rig.groups.connecting.clear()
        await leave(rig.changes.switch("new", True, 0, rig.tell), rig, "new: its workers")
        rig.groups.connecting.set()
        await over(rig.changes)
        assert rig.serving == (["a", "b"], ["a", "b"])


async def test_a_caller_who_leaves_while_the_former_ones_end_gets_them_back() -> None:
    async with rig_of("a", "b") as rig:
        rig.workers.ending.clear()
        await leave(rig.changes.switch("new", True, 0, rig.tell), rig, "ending a, b")
        assert rig.changes._line.now == "switching to new"
        rig.workers.ending.set()
        await over(rig.changes)
        assert rig.serving == (["a", "b"], ["a", "b"])
        assert "new" not in rig.workers.began
