"""What goes into one step: decodes first, then prompts in chunks, within the budget."""

from dataclasses import replace

import pytest

from router.core.effects import Admit, RunPlan
from router.core.state import CoreConfig
from tests.core.bench import END, WIDE, Bench, tokens_of, work_of


def test_a_prompt_is_computed_in_chunks_and_draws_at_its_end() -> None:
    bench = Bench(CoreConfig(plans_in_flight_max=1))
    bench.up(replace(WIDE, step_tokens_max=4))
    bench.submit(1, tuple(range(10, 20)))
    chunks = []
    for tokens in ({}, {}, {1: 5}):
        (plan,) = bench.sent()
        chunks.append(work_of(plan))
        bench.answer(plan, tokens)
    assert chunks == [{1: 4}, {1: 4}, {1: 2}]
    assert work_of(bench.sent()[0]) == {1: 1}


def test_the_first_plan_says_everything_about_a_sequence() -> None:
    bench = Bench()
    bench.up()
    bench.submit(7, (1, 2, 3))
    assert bench.sent()[0] == RunPlan(
        group="g",
        epoch=1,
        plan_id=1,
        drops=(),
        admits=(Admit(7, (1, 2, 3), 3, 0, 0, None),),
        work_sequences=(7,),
        work_tokens=(3,),
    )


def test_decodes_come_first_and_prompts_take_what_is_left() -> None:
    bench = Bench(CoreConfig(plans_in_flight_max=1))
    bench.up(replace(WIDE, step_tokens_max=5))
    bench.submit(1, (1, 2))
    (plan,) = bench.sent()
    bench.answer(plan, {1: 3})
    bench.submit(2, (4, 5, 6))
    bench.submit(3, (7, 8, 9))
    (plan,) = bench.sent()
    assert list(work_of(plan).items()) == [(1, 1), (2, 3), (3, 1)]
    bench.answer(plan, {1: 3, 2: 3})
    assert list(work_of(bench.sent()[0]).items()) == [(1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_so_many_plans_are_in_flight_as_are_allowed(depth: int) -> None:
    bench = Bench(CoreConfig(plans_in_flight_max=depth))
    bench.up()
    bench.submit(1, (1, 2, 3), max_tokens=10)
    plans = bench.sent()
    assert [work_of(plan)[1] for plan in plans] == [3, 1, 1][:depth]
    assert bench.group().plans_in_flight == depth
    bench.answer(plans[0], {1: 4})
    assert [plan.plan_id for plan in bench.sent()] == [depth + 1]


def test_a_token_that_was_asked_for_before_the_end_was_known_is_thrown_away() -> None:
    bench = Bench()
    bench.up()
    bench.submit(1, (1, 2, 3))
    first, second = bench.sent()
    assert tokens_of(bench.answer(first, {1: END})) == [(1, END)]
    assert bench.answer(second, {1: 4}) == []


def test_no_token_is_asked_for_beyond_the_last() -> None:
    bench = Bench(CoreConfig(plans_in_flight_max=3))
    bench.up()
    bench.submit(1, (1, 2, 3), max_tokens=2)
    assert [work_of(plan) for plan in bench.sent()] == [{1: 3}, {1: 1}]


def test_who_is_to_share_what_this_very_step_computes_waits_for_the_next() -> None:
    bench = Bench(CoreConfig(plans_in_flight_max=1, share_tokens_min=2))
    bench.up()
    bench.submit(1, (1, 2, 3, 4, 5))
    bench.submit(2, (1, 2, 3, 4, 6))
    bench.submit(3, (7, 8))
    (plan,) = bench.sent()
    assert work_of(plan) == {1: 5, 3: 2}
    bench.answer(plan, {1: 5, 3: 5})
    (plan,) = bench.sent()
    assert plan.admits == (Admit(2, (1, 2, 3, 4, 6), 5, 1, 4, None),)
    assert work_of(plan) == {1: 1, 3: 1, 2: 1}


def test_prompts_are_filled_in_order_of_placement_even_if_a_later_one_could_share() -> None:
    bench = Bench(CoreConfig(plans_in_flight_max=1, share_tokens_min=2))
    bench.up(replace(WIDE, step_tokens_max=4))
    bench.submit(1, tuple(range(10)))
    bench.submit(2, (0, 1, 2, 3, 50, 51))
    work = []
    for _ in range(3):
        (plan,) = bench.sent()
        work.append(work_of(plan))
        bench.answer(plan, {1: 5} if len(work) == 3 else {})
    assert work == [{1: 4}, {1: 4}, {1: 2, 2: 2}]
    assert plan.admits[0].share_len == 4


def test_drops_are_sent_even_if_there_is_no_work() -> None:
    bench = Bench(CoreConfig(share_tokens_min=2))
    bench.up(replace(WIDE, shares_prefix=False))
    bench.submit(1, (1, 2, 3))
    first, second = bench.sent()
    bench.end(1)
    bench.answer(first, {1: 4})
    (plan,) = bench.sent()
    assert (plan.drops, plan.work_sequences) == ((1,), ())
    bench.answer(second, {1: 4})
    bench.answer(plan, {})
    assert bench.sent() == []
    assert bench.group().kv_used == bench.group().kv_donors == 0
