"""The life of a request, from the event that brings it to its one end."""

from dataclasses import replace

import pytest

from router.core.effects import Abandon, Close, Deliver, Effect
from router.core.events import Limits, Reason, StepDone
from router.core.state import CoreConfig
from tests.core.bench import END, WIDE, Bench, endings_of, tokens_of

ONE = CoreConfig(plans_in_flight_max=1, share_tokens_min=2, reserve_tokens=0)


def test_a_request_is_delivered_token_by_token_and_closed_once() -> None:
    bench = Bench(ONE)
    bench.up()
    assert bench.submit(1, (1, 2, 3)) == []
    (plan,) = bench.sent()
    assert bench.answer(plan, {1: 4}) == [Deliver([1], [4], [])]
    (plan,) = bench.sent()
    assert bench.answer(plan, {1: END}) == [Deliver([1], [END], []), Close(1, Reason.EOS)]
    assert bench.end(1) == []
    assert bench.plan() == []


def test_an_answer_ends_at_max_tokens() -> None:
    bench = Bench(ONE)
    bench.up()
    bench.submit(1, (1, 2, 3), max_tokens=2)
    (plan,) = bench.sent()
    assert endings_of(bench.answer(plan, {1: 4})) == {}
    (plan,) = bench.sent()
    assert endings_of(bench.answer(plan, {1: 5})) == {1: Reason.LENGTH}


def test_a_stop_token_that_is_the_last_allowed_counts_as_a_stop() -> None:
    bench = Bench(ONE)
    bench.up()
    bench.submit(1, (1, 2, 3), max_tokens=1)
    (plan,) = bench.sent()
    assert endings_of(bench.answer(plan, {1: END})) == {1: Reason.EOS}


def test_logprobs_travel_with_their_tokens_past_those_thrown_away() -> None:
    bench = Bench(ONE)
    bench.up()
    bench.submit(1, (1, 2))
    bench.submit(2, (3, 4))
    (plan,) = bench.sent()
    bench.end(1)
    effects = bench.observe(StepDone("g", 1, plan.plan_id, [1, 2], [5, 6], ["of 1", "of 2"]))
    assert effects == [Deliver([2], [6], ["of 2"])]


@pytest.mark.parametrize("reason", [Reason.CANCELLED, Reason.STOP_STRING, Reason.SHUTDOWN])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_the_owner_can_end_a_request_at_any_moment(reason: Reason, steps: int) -> None:
    """Waiting, placed, in the middle of its prompt, decoding."""
    bench = Bench(ONE)
    bench.up(replace(WIDE, step_tokens_max=2))
    bench.submit(1, (1, 2, 3, 4))
    for step in range(steps):
        (plan,) = bench.sent()
        bench.answer(plan, {1: 5} if step else {})
    assert endings_of(bench.end(1, reason)) == {1: reason}
    for plan in bench.sent():
        bench.answer(plan, {1: 6} if plan.work_sequences else {})
    assert bench.core.snapshot().waiting == bench.core.snapshot().running == 0
    assert bench.group().kv_used == 0


# --- refusals


def test_more_than_requests_max_are_refused_at_once() -> None:
    bench = Bench(replace(ONE, requests_max=2))
    assert bench.submit(1, (1,)) == bench.submit(2, (1,)) == []
    (close,) = bench.submit(3, (1,))
    assert close == Close(3, Reason.OVERLOADED, "2 requests are waiting or running")
    bench.end(1)
    assert bench.submit(4, (1,)) == []


@pytest.mark.parametrize(
    ("limits", "needs", "reason", "detail"),
    [
        (
            replace(WIDE, length_max=7),
            (),
            Reason.TOO_LONG,
            "prompt and answer may have 8 tokens, but a worker holds 7",
        ),
        (
            replace(WIDE, kv_tokens=7),
            (),
            Reason.TOO_LONG,
            "prompt and answer may have 8 tokens, but a worker holds 7",
        ),
        (WIDE, ("lora",), Reason.UNSUPPORTED, "engine scripted does not support lora"),
    ],
)
def test_what_no_group_could_ever_run_is_refused_with_the_reason(
    limits: Limits, needs: tuple[str, ...], reason: Reason, detail: str
) -> None:
    bench = Bench(ONE)
    bench.up(limits)
    assert bench.submit(1, (1, 2, 3), max_tokens=5, needs=needs) == [Close(1, reason, detail)]


def test_while_no_group_is_up_requests_wait_and_are_judged_when_one_comes() -> None:
    bench = Bench(ONE)
    assert bench.submit(1, (1, 2, 3), needs=("lora",)) == bench.submit(2, (1, 2, 3)) == []
    assert bench.plan() == []
    bench.up()
    effects = bench.plan()
    assert endings_of(effects) == {1: Reason.UNSUPPORTED}
    assert [plan.work_sequences for plan in bench.plans] == [(2,)]


def test_requests_of_one_model_do_not_wait_for_those_of_another() -> None:
    bench = Bench(ONE)
    bench.up(model="m")
    bench.submit(1, (1, 2), model="other")
    bench.submit(2, (1, 2))
    assert [plan.work_sequences for plan in bench.sent()] == [(2,)]


# --- order


def test_nobody_overtakes_the_head_of_the_line_even_if_it_would_fit() -> None:
    bench = Bench(ONE)
    bench.up(replace(WIDE, kv_tokens=20))
    bench.submit(1, tuple(range(10)), max_tokens=1)
    bench.plan()
    bench.submit(2, tuple(range(50, 65)), max_tokens=1)
    bench.submit(3, (70, 71), max_tokens=1)
    assert bench.sent() == []
    assert bench.core.snapshot().waiting == 2


def test_a_more_urgent_request_overtakes_by_one_head_start_and_no_more() -> None:
    bench = Bench(replace(ONE, head_start_ms=100))
    for request, priority, at in ((1, 1, 0), (2, 1, 60), (3, 0, 90), (4, 0, 150)):
        bench.now = at
        bench.submit(request, (1, request), priority=priority)
    bench.up(replace(WIDE, sequences_max=1, shares_prefix=False))
    order = []
    for _ in range(4):
        plan = next(plan for plan in bench.sent() if plan.admits)
        order.append(plan.admits[0].sequence)
        bench.answer(plan, {order[-1]: END})
    assert order == [3, 1, 4, 2]


# --- deadlines


def test_a_request_ends_at_its_deadline_wherever_it_is() -> None:
    bench = Bench(ONE)
    bench.up(replace(WIDE, sequences_max=1))
    bench.submit(1, (1, 2), deadline_ms=50)
    bench.submit(2, (3, 4), deadline_ms=40)
    bench.plan()
    assert bench.core.wake_at() == 40
    assert endings_of(bench.tick(39)) == {}
    assert endings_of(bench.tick(40)) == {2: Reason.DEADLINE}
    assert bench.core.wake_at() == 50
    assert endings_of(bench.tick(50)) == {1: Reason.DEADLINE}


def test_the_timer_forgets_requests_that_have_ended() -> None:
    bench = Bench(ONE)
    bench.submit(1, (1, 2), deadline_ms=50)
    assert bench.core.wake_at() == 50
    bench.end(1)
    assert bench.core.wake_at() is None


def test_a_group_that_does_not_answer_is_abandoned() -> None:
    bench = Bench(replace(ONE, step_deadline_ms=100))
    bench.up()
    bench.now = 10
    bench.submit(1, (1, 2))
    bench.plan()
    assert bench.core.wake_at() == 110
    assert bench.tick(109) == []
    assert bench.tick(110) == [Abandon("g", 1, "no answer to a plan within 100 ms")]
    assert bench.core.wake_at() is None
    bench.up(epoch=2)
    assert [plan.epoch for plan in bench.sent()] == [2]


def test_the_clock_of_a_plan_starts_when_the_one_before_it_is_answered() -> None:
    bench = Bench(replace(ONE, plans_in_flight_max=2, step_deadline_ms=100))
    bench.up()
    bench.submit(1, (1, 2), max_tokens=9)
    first, second = bench.sent()
    bench.now = 90
    bench.answer(first, {1: 3})
    (third,) = bench.sent()
    assert bench.core.wake_at() == 190
    bench.now = 180
    assert tokens_of(bench.answer(second, {1: 4})) == [(1, 4)]
    assert bench.core.wake_at() == 280
    assert tokens_of(bench.answer(third, {1: 5})) == [(1, 5)]


# --- losses


def test_what_had_produced_nothing_is_tried_again_as_often_as_allowed() -> None:
    bench = Bench(replace(ONE, attempts_max=3))
    bench.submit(1, (1, 2))
    for epoch in (1, 2, 3):
        bench.up(epoch=epoch)
        assert [plan.work_sequences for plan in bench.sent()] == [(1,)]
        effects = bench.down(epoch=epoch)
    assert effects == [
        Close(1, Reason.WORKER_LOST, "the worker was lost 3 times in a row with this request")
    ]


def lost_after(bench: Bench, epoch: int, tokens: int) -> list[Effect]:
    """Request 1 goes on in a life of its group that is lost behind so many tokens of it."""
    bench.up(epoch=epoch)
    for _ in range(tokens):
        (plan,) = bench.sent()
        assert tokens_of(bench.answer(plan, {1: 3})) == [(1, 3)]
    bench.plan()
    return bench.down(epoch=epoch)


def test_losses_are_counted_anew_for_an_answer_that_gets_on_between_them() -> None:
    bench = Bench(replace(ONE, attempts_max=2, progress_tokens_min=4))
    bench.submit(1, (1, 2), max_tokens=100)
    for epoch, tokens in enumerate((0, 4, 5, 4), start=1):
        assert lost_after(bench, epoch, tokens) == []
    assert endings_of(lost_after(bench, 5, tokens=3)) == {1: Reason.WORKER_LOST}


def test_a_token_for_each_worker_that_it_ends_is_no_progress() -> None:
    """Nor are several of them together."""
    bench = Bench(replace(ONE, attempts_max=6, progress_tokens_min=4))
    bench.submit(1, (1, 2), max_tokens=100)
    for epoch in range(1, 6):
        assert lost_after(bench, epoch, tokens=1) == []
    assert endings_of(lost_after(bench, 6, tokens=1)) == {1: Reason.WORKER_LOST}


def test_a_loss_does_not_count_for_who_was_not_resident_yet() -> None:
    bench = Bench(replace(ONE, attempts_max=1))
    bench.up(replace(WIDE, step_tokens_max=2))
    bench.submit(1, (1, 2, 3, 4))
    bench.submit(2, (5, 6, 7, 8))
    bench.plan()
    assert endings_of(bench.down()) == {1: Reason.WORKER_LOST}
    bench.up(epoch=2)
    assert [plan.work_sequences for plan in bench.sent()] == [(2,)]


@pytest.mark.parametrize("resume", [False, True])
def test_a_broken_stream_goes_on_elsewhere_only_if_that_is_wanted(resume: bool) -> None:
    bench = Bench(replace(ONE, resume_streams=resume))
    bench.up(group="a")
    bench.submit(1, (1, 2))
    (plan,) = bench.sent()
    bench.answer(plan, {1: 3})
    bench.plan()
    lost = bench.down("a")
    bench.up(group="b")
    if resume:
        assert lost == []
        (plan,) = bench.sent()
        assert (plan.group, plan.admits[0].tokens, plan.admits[0].prompt_len) == ("b", (1, 2, 3), 2)
        assert tokens_of(bench.answer(plan, {1: 4})) == [(1, 4)]
        assert bench.core.snapshot().resumed == 1
    else:
        assert endings_of(lost) == {1: Reason.WORKER_LOST}
        assert bench.sent() == []


def test_who_comes_back_after_a_loss_stands_at_the_front() -> None:
    bench = Bench(ONE)
    bench.up(replace(WIDE, sequences_max=1))
    bench.submit(1, (1, 2))
    bench.plan()
    bench.submit(2, (3, 4))
    bench.down()
    bench.up(replace(WIDE, sequences_max=1), epoch=2)
    assert [plan.work_sequences for plan in bench.sent()] == [(1,)]


def test_news_and_outcomes_of_a_former_epoch_are_ignored() -> None:
    bench = Bench(ONE)
    bench.up()
    bench.submit(1, (1, 2))
    (former,) = bench.sent()
    bench.down()
    bench.up(epoch=2)
    (plan,) = bench.sent()
    assert bench.answer(former, {1: 7}) == []
    assert bench.down(epoch=1) == []
    assert tokens_of(bench.answer(plan, {1: 3})) == [(1, 3)]


# --- outcomes


@pytest.mark.parametrize(
    ("plan_id", "sequences", "tokens", "failures"),
    [
        (2, [1, 2], [5, 6], ()),  # not the oldest in flight
        (0, [1, 2], [5, 6], ()),
        (1, [1], [5], ()),  # one is missing
        (1, [1], [5], ((99, "somebody else failed"),)),
        (1, [1, 2, 2], [5, 6, 7], ()),  # one too many
        (1, [1, 1], [5, 6], ()),  # one twice
        (1, [1, 99], [5, 6], ()),  # one that was not asked for
        (1, [1, 2], [5], ()),  # lists of unequal length
        (1, [1, 2], [5, 6], ((2, "failed, and yet drew a token"),)),
    ],
)
def test_an_outcome_that_cannot_be_true_ends_the_life_of_the_group(
    plan_id: int, sequences: list[int], tokens: list[int], failures: tuple[tuple[int, str], ...]
) -> None:
    bench = Bench(replace(ONE, plans_in_flight_max=2))
    bench.up()
    bench.submit(1, (1, 2))
    bench.submit(2, (3, 4))
    assert len(bench.sent()) == 2
    outcome = StepDone("g", 1, plan_id, sequences, tokens, failures=failures)
    assert [type(effect) for effect in bench.observe(outcome)] == [Abandon]
    assert bench.observe(outcome) == []
    assert bench.core.snapshot().waiting == 2


def test_an_outcome_may_name_its_sequences_in_any_order() -> None:
    bench = Bench(ONE)
    bench.up()
    bench.submit(1, (1, 2))
    bench.submit(2, (3, 4))
    (plan,) = bench.sent()
    assert tokens_of(bench.answer(plan, {2: 6, 1: 5})) == [(2, 6), (1, 5)]


def test_a_sequence_that_the_engine_gives_up_is_closed_and_the_others_go_on() -> None:
    bench = Bench(replace(ONE, plans_in_flight_max=2))
    bench.up()
    bench.submit(1, (1, 2))
    bench.submit(2, (3, 4))
    first, second = bench.sent()
    effects = bench.answer(first, {2: 5}, failures=((1, "not a number"),))
    assert effects == [Deliver([2], [5], []), Close(1, Reason.ENGINE_FAILED, "not a number")]
    (third,) = bench.sent()
    assert third.drops == (1,)
    # The second plan still had work for it, and can draw nothing.
    assert tokens_of(bench.answer(second, {2: 6})) == [(2, 6)]
    assert tokens_of(bench.answer(third, {2: 7})) == [(2, 7)]
    assert bench.group().donors == 0


def test_a_failure_in_a_former_residence_does_not_end_a_sequence_that_was_admitted_anew() -> None:
    bench = Bench(replace(ONE, plans_in_flight_max=4))
    bench.up(replace(WIDE, kv_tokens=8, shares_prefix=False))
    bench.submit(1, (1, 2, 3, 4), max_tokens=3)
    bench.submit(2, (5, 6, 7, 8), max_tokens=4)
    bench.plan()
    bench.end(1)
    bench.plan()
    first, second, third, fourth = bench.plans
    assert (second.drops, fourth.admits[0].sequence) == ((2,), 2)  # preempted, and back again
    assert bench.answer(first, {1: 50}, failures=((2, "not a number"),)) == []
    for plan in (second, third):
        assert bench.answer(plan, {1: 50}) == []
    assert tokens_of(bench.answer(fourth, {2: 60})) == [(2, 60)]


# --- the whole in numbers


def test_the_snapshot_counts_requests_and_tokens() -> None:
    bench = Bench(ONE)
    bench.up(replace(WIDE, kv_tokens=21, page_tokens=2))
    bench.finish(1, (1, 2, 3, 4))
    bench.submit(2, (1, 2, 3, 4, 5, 6))
    bench.submit(3, tuple(range(50, 65)))
    bench.plan()
    shot = bench.core.snapshot()
    assert (shot.waiting, shot.running) == (1, 1)
    assert (shot.prefix_hit_tokens, shot.admitted_tokens) == (4, 10)
    group = bench.group()
    assert (group.name, group.epoch, group.model) == ("g", 1, "m")
    assert (group.kv_total, group.kv_used, group.kv_donors) == (20, 2, 4)
    assert (group.running, group.donors, group.plans_in_flight, group.plans) == (1, 1, 1, 2)
