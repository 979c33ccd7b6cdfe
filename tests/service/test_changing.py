"""Groups that come, go and take each other's place: every step, and every failure of one."""

import asyncio
import logging

import pytest

from router.change import Problem
from router.changing import DOWNLOADING
from router.group_steps import AT_ONCE_S
from tests.service.change_rig import LIMIT_S, leave, over, rig_of
from tests.service.fakes import until

IMPOSSIBLE, INVALID, UNKNOWN = Problem.IMPOSSIBLE, Problem.INVALID, Problem.UNKNOWN


# --- add


async def test_a_group_is_added_beside_the_others() -> None:
    async with rig_of("old") as rig:
        await rig.changes.add("new", 0, rig.tell)
        assert rig.serving == (["old", "new"], ["new", "old"])
        assert rig.lines == [
            "new: loading",
            "new: its workers have loaded, connecting",
            "new serves m: scripted on cpu",
        ]
        assert [state.spec.name for state in rig.changes.states()] == ["old", "new"]
        assert rig.changes.waiting == 3


async def test_a_description_that_is_wrong_starts_nothing() -> None:
    async with rig_of("old") as rig:
        rig.workers.check_error = "what is that"
        for change in (
            rig.changes.add("new", 0, rig.tell),
            rig.changes.switch("new", False, 0, rig.tell),
            rig.changes.switch("new", True, 0, rig.tell),
        ):
            assert await rig.refused(INVALID, change) == "what is that"
        assert rig.serving == (["old"], ["old"])
        assert rig.workers.began == []
        assert rig.groups.removals == []


@pytest.mark.parametrize("limit_s", [-1.0, float("nan"), float("inf")])
async def test_a_limit_that_is_no_time_is_refused(limit_s: float) -> None:
    async with rig_of("old", "new") as rig:
        for change in (
            rig.changes.add("new", limit_s, rig.tell),
            rig.changes.remove("new", limit_s, rig.tell),
            rig.changes.switch("new", False, limit_s, rig.tell),
        ):
            assert "limit_s (seconds)" in await rig.refused(INVALID, change)


async def test_workers_that_cannot_start_leave_nothing() -> None:
    async with rig_of("old") as rig:
        rig.workers.start_errors["new"] = "no room on the device"
        line = await rig.refused(IMPOSSIBLE, rig.changes.add("new", 0, rig.tell))
        assert line == "no room on the device"
        assert rig.serving == (["old"], ["old"])
        assert rig.groups.names() == ("old",)


async def test_a_name_or_address_that_is_taken_leaves_everything_as_it_was() -> None:
    async with rig_of("old") as rig:
        rig.groups.serve("new")
        line = await rig.refused(INVALID, rig.changes.switch("new", False, 0, rig.tell))
        assert line == "two groups are called new"
        assert rig.groups.up() == ["old", "new"]
        assert rig.groups.removals == []
        assert "new" not in rig.workers.running


async def test_a_group_that_cannot_serve_beside_the_others_is_taken_away() -> None:
    async with rig_of("old") as rig:
        rig.groups.refusals["new"] = "another vocabulary"
        line = await rig.refused(IMPOSSIBLE, rig.changes.add("new", 0, rig.tell))
        assert line == "new cannot serve: another vocabulary"
        assert rig.groups.names() == ("old",)
        assert rig.serving == (["old"], ["old"])


@pytest.mark.parametrize("held", ["downloaded", "loading", "connecting"])
async def test_a_group_that_takes_too_long_is_taken_away(held: str) -> None:
    async with rig_of("old") as rig:
        gate = rig.groups.connecting if held == "connecting" else getattr(rig.workers, held)
        gate.clear()
        line = await rig.refused(IMPOSSIBLE, rig.changes.add("new", 0.01, rig.tell))
        more = DOWNLOADING if held == "downloaded" else ""
        assert line == f"new did not serve within 0.01 s{more}"
        assert rig.groups.names() == ("old",)
        assert rig.serving == (["old"], ["old"])


@pytest.mark.parametrize(
    ("held", "line"), [("loading", "new: loading"), ("connecting", "new: its")]
)
async def test_when_the_caller_leaves_a_group_that_does_not_serve_goes(
    held: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with rig_of("old") as rig:
        gate = rig.workers.loading if held == "loading" else rig.groups.connecting
        gate.clear()
        await leave(rig.changes.add("new", 0, rig.tell), rig, line)
        await over(rig.changes)
        assert rig.groups.names() == ("old",)
        assert rig.serving == (["old"], ["old"])
        assert "adding new: given up, as whoever asked for it has left" in caplog.messages
        gate.set()
        await rig.changes.add("new", 0, rig.tell)
        assert rig.serving == (["old", "new"], ["new", "old"])


async def test_a_caller_who_leaves_while_a_failed_group_goes_holds_up_nothing() -> None:
    async with rig_of("old") as rig:
        rig.groups.refusals["new"] = "another vocabulary"
        rig.workers.ending.clear()
        caller = asyncio.create_task(rig.changes.add("new", 0, rig.tell))
        await until(lambda: ("new", AT_ONCE_S, True) in rig.groups.removals)
        caller.cancel()
        await asyncio.wait([caller])
        rig.workers.ending.set()
        await over(rig.changes)
        assert rig.groups.names() == ("old",)
        assert rig.serving == (["old"], ["old"])


async def test_a_fault_of_the_router_is_told_and_ends_the_change_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with rig_of("old") as rig:
        rig.groups.broken = "new"
        line = await rig.refused(IMPOSSIBLE, rig.changes.add("new", 0, rig.tell))
        assert line == "the router failed; its log says why"
        assert any(record.exc_info for record in caplog.records)
        assert rig.serving == (["old"], ["old"])


# --- remove


async def test_a_group_is_removed_and_its_workers_end() -> None:
    async with rig_of("a", "b") as rig:
        rig.groups.entries["a"].running = 2
        rig.groups.emptied.clear()
        removal = asyncio.create_task(rig.changes.remove("a", 0, rig.tell))
        await until(lambda: rig.lines)
        assert rig.lines == ["a takes no more requests; sequences that run there: 2"]
        assert rig.workers.running == {"a", "b"}
        rig.groups.emptied.set()
        await removal
        assert rig.lines[-1] == "a has been removed"
        assert rig.groups.removals == [("a", LIMIT_S, False)]
        assert rig.serving == (["b"], ["b"])


async def test_a_removal_has_the_limit_that_the_call_gives() -> None:
    async with rig_of("a", "b") as rig:
        await rig.changes.remove("a", 2.5, rig.tell)
        assert rig.groups.removals == [("a", 2.5, False)]


async def test_what_cannot_be_removed_stays() -> None:
    async with rig_of("a") as rig:
        line = await rig.refused(UNKNOWN, rig.changes.remove("b\n", 0, rig.tell))
        assert line == "no group is called b; there is: a"
        line = await rig.refused(IMPOSSIBLE, rig.changes.remove("a", 0, rig.tell))
        assert line.startswith("a is the only group that serves m now: add another one first")
        rig.groups.entries["a"].state = "down"
        line = await rig.refused(IMPOSSIBLE, rig.changes.remove("a", 0, rig.tell))
        assert line.startswith("a is the only group: ")
        rig.groups.serve("other")
        line = await rig.refused(IMPOSSIBLE, rig.changes.remove("other", 0, rig.tell))
        assert line.startswith("other is the only group that serves n now")
        assert rig.groups.removals == []
        await rig.changes.remove("a", 0, rig.tell)
        assert rig.groups.names() == ("other",)


async def test_a_group_goes_on_leaving_when_the_caller_leaves() -> None:
    async with rig_of("a", "b") as rig:
        rig.groups.emptied.clear()
        await leave(rig.changes.remove("a", 0, rig.tell), rig, "a takes no more")
        line = await rig.refused(IMPOSSIBLE, rig.changes.add("new", 0, rig.tell))
        assert line == "another change is under way: removing a; try again when it is done"
        rig.groups.emptied.set()
        await over(rig.changes)
        assert rig.serving == (["b"], ["b"])


# --- switch


async def test_a_new_group_takes_the_place_of_all_of_its_model_and_of_no_other() -> None:
    async with rig_of("a", "b") as rig:
        rig.groups.serve("other")
        rig.groups.entries["b"].state = "down"
        await rig.changes.switch("new", False, 0, rig.tell)
        assert rig.groups.up() == ["other", "new"]
        assert rig.workers.running == {"new"}
        assert sorted(rig.groups.removals) == [("a", LIMIT_S, False), ("b", LIMIT_S, False)]
        assert rig.lines[-1] == "new serves m in the place of: a, b"


async def test_former_groups_leave_together_so_that_none_takes_what_another_had() -> None:
    async with rig_of("a", "b") as rig:
        rig.groups.emptied.clear()
        switch = asyncio.create_task(rig.changes.switch("new", False, 0, rig.tell))
        await until(lambda: len(rig.groups.removals) == 2)
        assert rig.groups.up() == ["new"]
        assert rig.workers.running == {"a", "b", "new"}
        rig.groups.emptied.set()
        await switch


async def test_a_group_of_another_model_takes_nobodys_place() -> None:
    async with rig_of("a", "b") as rig:
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("other", False, 0, rig.tell))
        assert line.startswith("other serves n, and no other group does")
        assert "models served: m)" in line
        assert rig.serving == (["a", "b"], ["a", "b"])
        assert rig.groups.removals == [("other", AT_ONCE_S, True)]


@pytest.mark.parametrize("failing", ["start", "connect", "limit"])
async def test_the_former_groups_serve_on_if_the_new_one_cannot(failing: str) -> None:
    async with rig_of("a", "b") as rig:
        limit_s = 0.0
        match failing:
            case "start":
                rig.workers.start_errors["new"] = "no room"
            case "connect":
                rig.groups.refusals["new"] = "no room"
            case _:
                rig.groups.connecting.clear()
                limit_s = 0.01
        line = await rig.refused(IMPOSSIBLE, rig.changes.switch("new", False, limit_s, rig.tell))
        assert "no room" in line or "within 0.01 s" in line
        assert rig.serving == (["a", "b"], ["a", "b"])
        assert all(name == "new" for name, _, _ in rig.groups.removals)


async def test_a_caller_who_leaves_before_the_new_group_serves_changes_nothing() -> None:
    async with rig_of("a") as rig:
        rig.groups.connecting.clear()
        await leave(rig.changes.switch("new", False, 0, rig.tell), rig, "new: its workers")
        await over(rig.changes)
        assert rig.serving == (["a"], ["a"])


async def test_a_caller_who_leaves_afterwards_changes_nothing_either() -> None:
    async with rig_of("a") as rig:
        rig.groups.emptied.clear()
        await leave(rig.changes.switch("new", False, 0, rig.tell), rig, "a takes no more")
        rig.groups.emptied.set()
        await over(rig.changes)
        assert rig.serving == (["new"], ["new"])


# --- one at a time, and the end


async def test_one_change_at_a_time() -> None:
    async with rig_of("a", "b") as rig:
        rig.workers.loading.clear()
        first = asyncio.create_task(rig.changes.add("new", 0, rig.tell))
        await until(lambda: rig.lines)
        for change in (
            rig.changes.add("other", 0, rig.tell),
            rig.changes.remove("a", 0, rig.tell),
            rig.changes.switch("other", False, 0, rig.tell),
        ):
            told = await rig.refused(IMPOSSIBLE, change)
            assert told == "another change is under way: adding new; try again when it is done"
        rig.workers.loading.set()
        await first
        await rig.changes.remove("a", 0, rig.tell)
        assert rig.groups.up() == ["b", "new"]


async def test_a_server_that_takes_no_more_lets_a_change_go_on() -> None:
    """Requests that are to end before the server does may wait for the new group."""
    async with rig_of("a") as rig:
        rig.workers.loading.clear()
        switch = asyncio.create_task(rig.changes.switch("new", True, 0, rig.tell))
        await until(lambda: rig.workers.began == ["new"])
        rig.changes.take_no_more()
        told = await rig.refused(IMPOSSIBLE, rig.changes.add("other", 0, rig.tell))
        assert told == "the server is shutting down"
        rig.workers.loading.set()
        await switch
        assert rig.groups.up() == ["new"]
        told = await rig.refused(IMPOSSIBLE, rig.changes.remove("new", 0, rig.tell))
        assert told == "the server is shutting down"


async def test_a_server_that_shuts_down_waits_for_no_change() -> None:
    async with rig_of("a") as rig:
        rig.groups.connecting.clear()
        switch = asyncio.create_task(
            rig.refused(IMPOSSIBLE, rig.changes.switch("new", True, 0, rig.tell))
        )
        await until(lambda: "new: its workers have loaded, connecting" in rig.lines)
        await rig.changes.close()
        assert await switch == "the server is shutting down"
        assert rig.workers.began == ["new"], "nothing is started any more"
        told = await rig.refused(IMPOSSIBLE, rig.changes.remove("a", 0, rig.tell))
        assert told == "the server is shutting down"


async def test_a_server_that_shuts_down_waits_for_no_group_that_leaves() -> None:
    async with rig_of("a", "b") as rig:
        rig.groups.emptied.clear()
        await leave(rig.changes.remove("a", 0, rig.tell), rig, "a takes no more")
        await rig.changes.close()
        assert rig.groups.entries["a"].state == "leaving"
