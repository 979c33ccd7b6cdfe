"""Answers that have begun, and whose worker does not come back."""

from dataclasses import replace

from router.core.effects import Close
from router.core.events import GroupLeaving, Reason
from router.core.state import CoreConfig
from tests.core.bench import WIDE, Bench, endings_of, tokens_of

CONFIG = CoreConfig(
    plans_in_flight_max=1, share_tokens_min=2, reserve_tokens=0, resume_timeout_ms=100
)
DETAIL = "the worker was lost, and none came up to go on within 100 ms"


def begun(config: CoreConfig = CONFIG) -> Bench:
    """A request of group ``a`` that has one token."""
    bench = Bench(config)
    bench.up(group="a")
    bench.submit(1, (1, 2))
    (plan,) = bench.sent()
    bench.answer(plan, {1: 3})
    bench.plan()
    return bench


def lost_at(bench: Bench, now: int, epoch: int = 1) -> None:
    bench.now = now
    assert bench.down("a", epoch) == []
    bench.plan()


def test_it_is_given_up_when_its_time_is_over_and_not_before() -> None:
    bench = begun()
    lost_at(bench, 1000)
    assert bench.core.wake_at() == 1100
    assert bench.tick(1099) == []
    assert bench.core.plan(1100) == [Close(1, Reason.WORKER_LOST, DETAIL)]
    assert bench.core.wake_at() is None


def test_one_that_has_shown_nothing_waits_on() -> None:
    bench = begun()
    bench.submit(2, (4, 5))
    bench.plan()
    lost_at(bench, 1000)
    assert endings_of(bench.tick(5000)) == {1: Reason.WORKER_LOST}
    assert bench.core.wake_at() is None
    bench.up(group="a", epoch=2)
    assert [plan.work_sequences for plan in bench.sent()] == [(2,)]


def test_a_group_that_comes_up_in_time_takes_it_and_the_next_loss_starts_the_clock_anew() -> None:
    bench = begun()
    lost_at(bench, 1000)
    bench.tick(1060)
    bench.up(group="a", epoch=2)
    (plan,) = bench.tick(1099)
    assert bench.core.wake_at() == 1099 + CONFIG.step_deadline_ms
    assert tokens_of(bench.answer(plan, {1: 4})) == [(1, 4)]
    bench.plan()
    lost_at(bench, 2000, epoch=2)
    assert bench.tick(2099) == []
    assert endings_of(bench.tick(2100)) == {1: Reason.WORKER_LOST}


def test_it_waits_for_room_for_as_long_as_a_group_is_there() -> None:
    """It is first in line there, which moves on by itself."""
    bench = begun()
    bench.up(replace(WIDE, sequences_max=1), group="b")
    bench.submit(2, (7, 8), max_tokens=2)
    bench.submit(3, (7, 9), max_tokens=2)
    busy = next(plan for plan in bench.sent() if plan.group == "b")
    lost_at(bench, 1000)
    assert bench.core.wake_at() == 0 + CONFIG.step_deadline_ms
    assert bench.tick(1500) == []
    assert endings_of(bench.answer(busy, {busy.work_sequences[0]: 9})) != {}
    assert [plan.admits[0].tokens for plan in bench.sent()] == [(1, 2, 3)]


def test_a_group_of_another_model_is_none_and_one_that_leaves_neither() -> None:
    bench = begun()
    bench.up(group="other", model="n")
    bench.now = 1000
    bench.observe(GroupLeaving("a", 1, at_once=True))
    bench.plan()
    assert bench.core.wake_at() == 1000 + 100
    assert endings_of(bench.tick(1100)) == {1: Reason.WORKER_LOST}


def test_without_any_patience_it_goes_on_only_where_a_group_is_up_already() -> None:
    config = replace(CONFIG, resume_timeout_ms=0)
    bench = begun(config)
    bench.down("a")
    assert endings_of(bench.plan()) == {1: Reason.WORKER_LOST}
    bench = begun(config)
    bench.up(group="b")
    bench.down("a")
    (plan,) = bench.sent()
    assert (plan.group, plan.admits[0].tokens) == ("b", (1, 2, 3))


def test_a_client_that_leaves_meanwhile_is_forgotten() -> None:
    bench = begun()
    lost_at(bench, 1000)
    assert endings_of(bench.end(1)) == {1: Reason.CANCELLED}
    assert bench.tick(1001) == []
    assert bench.core.wake_at() is None
    assert bench.tick(1100) == []


def test_it_waits_for_the_only_group_that_can_go_on_with_it() -> None:
    """Another one is up, and holds too little; whoever comes later is served there meanwhile."""
    bench = Bench(CONFIG)
    bench.up(group="large")
    bench.submit(1, (1, 2), max_tokens=20)
    (plan,) = bench.sent()
    bench.answer(plan, {1: 3})
    bench.plan()
    bench.up(replace(WIDE, length_max=8), group="small")
    assert bench.down("large", 1) == []
    assert bench.plan() == []
    bench.submit(2, (4, 5))
    assert [plan.group for plan in bench.sent()] == ["small"]
    assert bench.core.snapshot().waiting == 1
    bench.up(group="large", epoch=2)
    (plan,) = bench.sent()
    assert (plan.group, plan.admits[0].tokens) == ("large", (1, 2, 3))


def test_it_is_given_up_beside_a_group_that_is_of_no_use() -> None:
    bench = begun()
    bench.up(replace(WIDE, length_max=3), group="small")
    lost_at(bench, 1000)
    assert bench.core.wake_at() == 1100
    bench.up(replace(WIDE, length_max=3), group="small too")
    assert bench.tick(1099) == []
    assert bench.core.plan(1100) == [Close(1, Reason.WORKER_LOST, DETAIL)]


def test_its_owner_can_end_it_while_it_waits_for_a_group_that_is_of_use() -> None:
    bench = begun()
    bench.up(replace(WIDE, length_max=3), group="small")
    lost_at(bench, 1000)
    assert bench.end(1) == [Close(1, Reason.CANCELLED)]
    assert bench.core.snapshot().waiting == 0
    assert bench.plan() == []
    assert bench.core.wake_at() is None
