"""Requests for what only a group can do that was up a moment ago: they wait for it."""

from dataclasses import replace

import pytest

from router.core.effects import Abandon, Close
from router.core.events import GroupGone, GroupLeaving, Reason
from router.core.state import CoreConfig
from tests.core.bench import WIDE, Bench, endings_of

CONFIG = CoreConfig(
    plans_in_flight_max=1, share_tokens_min=2, reserve_tokens=0, resume_timeout_ms=100
)
SHORT = replace(WIDE, length_max=8)


def apart(config: CoreConfig = CONFIG, now: int = 1000) -> Bench:
    """A group that holds little, and beside it a larger one with an adapter, which goes down."""
    bench = Bench(config)
    bench.up(SHORT, group="small")
    bench.up(group="large", features=("grammar",), adapters=("prose",))
    bench.now = now
    assert bench.down("large") == []
    return bench


@pytest.mark.parametrize(
    "wish", [{"max_tokens": 20}, {"needs": ("grammar",)}, {"adapter": "prose"}], ids=str
)
def test_what_a_group_could_do_that_was_lost_waits_until_it_is_back(
    wish: dict[str, object],
) -> None:
    bench = apart()
    assert bench.submit(1, (1, 2), **wish) == []  # type: ignore[arg-type]
    bench.submit(2, (3, 4))
    assert [plan.work_sequences for plan in bench.sent()] == [(2,)]  # nobody is held up
    assert bench.core.snapshot().waiting == 1
    bench.up(group="large", epoch=2, features=("grammar",), adapters=("prose",))
    assert [(plan.group, plan.work_sequences) for plan in bench.sent()] == [("large", (1,))]


def test_it_is_refused_when_the_group_has_been_away_for_too_long() -> None:
    bench = apart()
    bench.now = 1050
    bench.submit(1, (1, 2), max_tokens=20)
    assert bench.plan() == []
    assert bench.core.wake_at() == 1100
    assert bench.tick(1099) == []
    detail = "prompt and answer may have 22 tokens, but a worker holds 8"
    assert bench.tick(1100) == [Close(1, Reason.TOO_LONG, detail)]
    assert bench.core.wake_at() is None
    assert endings_of(bench.submit(2, (1, 2), max_tokens=20)) == {2: Reason.TOO_LONG}


def test_what_neither_can_do_is_refused_at_once() -> None:
    bench = apart()
    assert endings_of(bench.submit(1, (1, 2), adapter="verse")) == {1: Reason.UNSUPPORTED}
    assert bench.core.wake_at() is None


def test_it_is_refused_when_the_group_comes_back_with_less() -> None:
    bench = apart()
    bench.submit(1, (1, 2), max_tokens=20)
    bench.plan()
    bench.up(SHORT, group="large", epoch=2)
    assert endings_of(bench.plan()) == {1: Reason.TOO_LONG}


def test_it_is_refused_when_the_group_is_gone_for_good() -> None:
    bench = apart()
    bench.submit(1, (1, 2), max_tokens=20)
    bench.plan()
    assert bench.observe(GroupGone("large")) == []
    assert endings_of(bench.plan()) == {1: Reason.TOO_LONG}


def test_its_own_deadline_ends_it_before() -> None:
    bench = apart()
    bench.submit(1, (1, 2), max_tokens=20, deadline_ms=1020)
    assert bench.plan() == []
    assert endings_of(bench.tick(1020)) == {1: Reason.DEADLINE}
    assert bench.core.snapshot().waiting == 0


def test_one_that_ran_without_a_token_waits_too_when_its_worker_is_lost() -> None:
    bench = Bench(CONFIG)
    bench.up(SHORT, group="small")
    bench.up(group="large")
    bench.submit(1, (1, 2), max_tokens=20)
    assert [plan.group for plan in bench.sent()] == ["large"]
    assert bench.down("large") == []
    assert bench.plan() == []
    bench.up(group="large", epoch=2)
    assert [plan.work_sequences for plan in bench.sent()] == [(1,)]


def test_a_group_that_is_given_up_is_one_that_was_up_a_moment_ago() -> None:
    bench = Bench(replace(CONFIG, step_deadline_ms=50))
    bench.up(SHORT, group="small")
    bench.up(group="large")
    bench.submit(1, (1, 2), max_tokens=20)
    bench.plan()
    assert [effect.group for effect in bench.tick(50) if isinstance(effect, Abandon)] == ["large"]
    assert bench.submit(2, (1, 2), max_tokens=20) == []
    assert endings_of(bench.tick(149)) == {}
    assert endings_of(bench.tick(150)) == {1: Reason.TOO_LONG, 2: Reason.TOO_LONG}


@pytest.mark.parametrize("returns", [False, True])
def test_while_a_group_leaves_it_is_waited_for_if_it_is_to_come_again(returns: bool) -> None:
    bench = Bench(CONFIG)
    bench.up(SHORT, group="small")
    bench.up(group="large")
    bench.submit(1, (1, 2), max_tokens=20)
    bench.plan()
    assert bench.observe(GroupLeaving("large", 1, returns=returns)) == []
    refused = endings_of(bench.submit(2, (3, 4), max_tokens=20))
    assert refused == ({} if returns else {2: Reason.TOO_LONG})
    assert endings_of(bench.tick(5000)) == {}  # it still leaves
    bench.end(1)
    assert bench.down("large") == []
    assert endings_of(bench.submit(3, (3, 4), max_tokens=20)) == (
        {} if returns else {3: Reason.TOO_LONG}
    )
    assert endings_of(bench.tick(5100)) == (
        {2: Reason.TOO_LONG, 3: Reason.TOO_LONG} if returns else {}
    )


def test_a_group_of_another_model_is_not_waited_for() -> None:
    bench = Bench(CONFIG)
    bench.up(SHORT, group="small")
    bench.up(group="other", model="n")
    bench.down("other")
    assert endings_of(bench.submit(1, (1, 2), max_tokens=20)) == {1: Reason.TOO_LONG}


def test_those_who_wait_leave_half_of_the_places_to_all_others() -> None:
    """They come at one instant, before the core plans."""
    bench = apart(replace(CONFIG, requests_max=4))
    detail = "too many requests wait for a worker that is away"
    assert bench.submit(1, (1, 2), max_tokens=20) == []
    assert bench.submit(2, (1, 2), max_tokens=20) == []
    assert bench.submit(3, (1, 2), max_tokens=20) == [Close(3, Reason.OVERLOADED, detail)]
    assert bench.submit(4, (1, 2)) == bench.submit(5, (1, 2)) == []
    bench.plan()
    assert endings_of(bench.submit(6, (1, 2))) == {6: Reason.OVERLOADED}
