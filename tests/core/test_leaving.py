"""Groups that are to go: what they had goes on elsewhere, or to its end where it is."""

from dataclasses import replace

from router.core.effects import Close, Left
from router.core.events import GroupLeaving, Reason
from router.core.state import CoreConfig
from tests.core.bench import WIDE, Bench, endings_of, tokens_of

ONE = CoreConfig(plans_in_flight_max=1, share_tokens_min=2, reserve_tokens=0, resume_streams=True)


def begun(config: CoreConfig = ONE) -> Bench:
    """A bench whose group g has delivered the first token, 5, of request 1."""
    bench = Bench(config)
    bench.up()
    bench.submit(1, (1, 2, 3))
    bench.answer(bench.sent()[0], {1: 5})
    return bench


def running_in(bench: Bench, group: str) -> list[int]:
    """The requests that hold a place in a group."""
    return sorted(
        number
        for number, sequence in bench.core._live.items()
        if sequence.group is not None and sequence.group.up.group == group
    )


def test_a_stream_moves_to_another_group_with_the_tokens_it_has() -> None:
    bench = begun()
    bench.up(group="h")
    bench.observe(GroupLeaving("g", 1))
    dropped, admitted = bench.sent()
    assert (dropped.group, dropped.drops, dropped.work_sequences) == ("g", (1,), ())
    assert (admitted.group, admitted.work_tokens) == ("h", (4,))
    assert (admitted.admits[0].tokens, admitted.admits[0].prompt_len) == ((1, 2, 3, 5), 3)
    assert tokens_of(bench.answer(admitted, {1: 6})) == [(1, 6)]
    assert bench.core.counters.moved == 1
    assert bench.core.counters.resumed == 0


def test_a_token_of_the_group_that_was_left_is_not_delivered_again() -> None:
    bench = begun(replace(ONE, plans_in_flight_max=2))
    bench.up(group="h")
    bench.sent()
    late = bench.plans[1]
    bench.observe(GroupLeaving("g", 1))
    bench.sent()
    assert tokens_of(bench.answer(late, {1: 6})) == []


def test_a_stream_that_nobody_else_can_take_ends_where_it_is() -> None:
    bench = begun()
    bench.observe(GroupLeaving("g", 1))
    (plan,) = bench.sent()
    assert (plan.group, plan.work_sequences) == ("g", (1,))
    assert endings_of(bench.answer(plan, {1: 9})) == {1: Reason.EOS}
    assert bench.plan() == [Left("g", 1)]


def test_a_stream_moves_as_soon_as_another_group_has_room() -> None:
    bench = begun()
    bench.up(replace(WIDE, sequences_max=1, shares_prefix=False), group="h")
    bench.submit(2, (7, 8))  # goes where there is more room, and both have enough
    bench.sent()
    bench.observe(GroupLeaving("g", 1))
    bench.plan()
    (taken,) = running_in(bench, "h")
    assert running_in(bench, "g") == [3 - taken], "there is one place, and both run on"
    bench.end(taken)
    bench.plan()
    assert running_in(bench, "h") == [3 - taken]


def test_nobody_is_placed_in_a_group_that_is_to_go() -> None:
    bench = begun()
    bench.observe(GroupLeaving("g", 1))
    assert bench.submit(2, (7, 8)) == []
    (plan,) = bench.sent()
    assert plan.work_sequences == (1,)
    bench.up(group="h")
    moved = {plan.group: plan.work_sequences for plan in bench.sent()}
    assert set(moved["h"]) >= {2}


def test_at_once_all_of_it_waits_for_another_group() -> None:
    bench = begun()
    assert bench.observe(GroupLeaving("g", 1, at_once=True)) == []
    (dropped,) = bench.sent()
    assert (dropped.drops, dropped.work_sequences) == ((1,), ())
    bench.answer(dropped, {})
    assert bench.plan() == [Left("g", 1)]
    assert bench.down() == []
    bench.up(group="h")
    (plan,) = bench.sent()
    assert (plan.group, plan.admits[0].tokens) == ("h", (1, 2, 3, 5))


def test_an_answer_that_may_not_be_continued_stays_or_ends() -> None:
    config = replace(ONE, resume_streams=False)
    bench = begun(config)
    bench.up(group="h")
    bench.observe(GroupLeaving("g", 1))
    (plan,) = bench.sent()
    assert plan.group == "g"
    (closed,) = bench.observe(GroupLeaving("g", 1, at_once=True))
    assert isinstance(closed, Close)
    assert closed.reason is Reason.WORKER_LOST


def test_one_that_only_waits_in_the_group_goes_though_it_may_not_be_continued() -> None:
    """It was preempted after its first tokens, and is placed again, behind plans in flight."""
    bench = Bench(replace(ONE, resume_streams=False, plans_in_flight_max=2))
    bench.up(replace(WIDE, kv_tokens=8, shares_prefix=False))
    bench.submit(1, (1, 2, 3), max_tokens=5)
    bench.submit(2, (4, 5), max_tokens=4)
    bench.plan()
    answered = 0
    while not bench.core.counters.preempted:
        group, plan = bench.core._groups["g"], bench.plans[answered]
        bench.answer(plan, dict.fromkeys(group.in_flight[0].samples, 6))
        answered += 1
        bench.plan()
    bench.end(1)
    bench.plan()
    waiting = bench.core._live[2]
    assert waiting.produced
    assert waiting.group is not None
    assert not waiting.admitted
    assert bench.observe(GroupLeaving("g", 1, at_once=True)) == []
    assert bench.core.snapshot().waiting == 1


def sharing() -> Bench:
    """Of three, one shares a part of the first; another waits for more of it than that one has."""
    bench = Bench(ONE)
    bench.up(replace(WIDE, step_tokens_max=5))
    bench.submit(1, (1, 2, 3, 4, 5, 6, 7, 8))
    bench.submit(2, (1, 2, 3, 9))
    bench.submit(3, (1, 2, 3, 4, 5, 6, 7, 9))
    (plan,) = bench.sent()
    bench.answer(plan, {})
    (plan,) = bench.sent()
    assert [admit.sequence for admit in plan.admits] == [2], "the third waits for the first"
    return bench


def test_those_who_were_to_share_what_has_moved_are_not_forgotten() -> None:
    bench = sharing()
    bench.up(group="h")
    bench.observe(GroupLeaving("g", 1))
    bench.plan()
    assert running_in(bench, "h") == [1, 2, 3]


def test_those_who_were_to_share_what_has_to_go_at_once_are_not_forgotten() -> None:
    bench = sharing()
    assert bench.observe(GroupLeaving("g", 1, at_once=True)) == []
    assert bench.core.snapshot().waiting == 3
    bench.plan()
    bench.up(group="h")
    bench.plan()
    assert running_in(bench, "h") == [1, 2, 3]


def test_what_is_said_of_a_former_life_changes_nothing() -> None:
    bench = begun()
    assert bench.observe(GroupLeaving("g", 2)) == []
    assert bench.observe(GroupLeaving("x", 1)) == []
    bench.submit(2, (7, 8))
    (plan,) = bench.sent()
    assert 2 in plan.work_sequences
