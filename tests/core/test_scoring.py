"""Log probabilities of prompts: told by workers once or twice, delivered once."""

import pytest

from router.core.effects import Abandon, Deliver, Effect, RunPlan
from router.core.events import PROMPT_LOGPROBS, Limits, Reason, StepDone
from router.core.state import CoreConfig
from tests.core.bench import WIDE, Bench, endings_of, work_of

ONE = CoreConfig(plans_in_flight_max=1, share_tokens_min=2, reserve_tokens=0)
SCORES = (PROMPT_LOGPROBS,)
NARROW = Limits(1000, 1, 16, 3, 1000, shares_prefix=True)
Told = tuple[tuple[int, int, list[object]], ...]


def bench_of(limits: Limits = WIDE, config: CoreConfig = ONE) -> Bench:
    bench = Bench(config)
    bench.up(limits, features=SCORES)
    return bench


def told(
    bench: Bench,
    plan: RunPlan,
    prompts: Told,
    tokens: dict[int, int],
    failures: tuple[tuple[int, str], ...] = (),
) -> list[Effect]:
    """A group answers a plan, with log probabilities of prompts."""
    drawn = list(tokens.values())
    done = StepDone(
        plan.group, plan.epoch, plan.plan_id, list(tokens), drawn, (), failures, prompts
    )
    return bench.observe(done)


def test_they_are_delivered_chunk_by_chunk_before_the_first_token() -> None:
    bench = bench_of(NARROW)
    bench.submit(1, (1, 2, 3, 4, 5), needs=SCORES)
    (plan,) = bench.sent()
    assert work_of(plan) == {1: 3}
    first = told(bench, plan, ((1, 1, ["b", "c", "d"]),), {})
    assert first == [Deliver([], [], [], [(1, ["b", "c", "d"])])]
    (plan,) = bench.sent()
    assert told(bench, plan, ((1, 4, ["e"]),), {1: 7}) == [Deliver([1], [7], [], [(1, ["e"])])]


def test_they_may_all_come_with_the_first_token() -> None:
    bench = bench_of(NARROW)
    bench.submit(1, (1, 2, 3, 4), needs=SCORES)
    (plan,) = bench.sent()
    assert told(bench, plan, (), {}) == []
    (plan,) = bench.sent()
    (delivery,) = told(bench, plan, ((1, 1, ["b", "c", "d"]),), {1: 7})
    assert delivery == Deliver([1], [7], [], [(1, ["b", "c", "d"])])


def test_a_prompt_of_one_token_has_none() -> None:
    bench = bench_of()
    bench.submit(1, (1,), needs=SCORES)
    (plan,) = bench.sent()
    assert told(bench, plan, (), {1: 7}) == [Deliver([1], [7], [])]


def test_the_whole_prompt_is_computed_whoever_holds_its_start() -> None:
    bench = bench_of()
    bench.finish(1, (1, 2, 3, 4))
    bench.submit(2, (1, 2, 3, 4, 5), needs=SCORES)
    (plan,) = bench.sent()
    assert [(admit.sequence, admit.share_len) for admit in plan.admits] == [(2, 0)]
    assert work_of(plan) == {2: 5}


def test_others_share_what_a_scored_prompt_has_computed() -> None:
    bench = bench_of()
    bench.submit(1, (1, 2, 3, 4), max_tokens=1, needs=SCORES)
    (plan,) = bench.sent()
    effects = told(bench, plan, ((1, 1, ["b", "c", "d"]),), {1: 9})
    assert endings_of(effects) == {1: Reason.EOS}
    bench.submit(2, (1, 2, 3, 4, 5))
    (plan,) = bench.sent()
    assert [(admit.share_from, admit.share_len) for admit in plan.admits] == [(1, 4)]


def test_after_a_loss_only_the_rest_is_news() -> None:
    bench = bench_of(NARROW)
    bench.submit(1, (1, 2, 3, 4, 5), needs=SCORES)
    (plan,) = bench.sent()
    told(bench, plan, ((1, 1, ["b", "c"]),), {})
    bench.down()
    bench.up(features=SCORES, epoch=2)
    (plan,) = bench.sent()
    (delivery,) = told(bench, plan, ((1, 1, ["B", "C", "D", "E"]),), {1: 7})
    assert delivery == Deliver([1], [7], [], [(1, ["D", "E"])])


def test_what_was_told_already_is_told_in_vain() -> None:
    bench = bench_of(config=CoreConfig(resume_streams=True, plans_in_flight_max=1))
    bench.submit(1, (1, 2, 3), needs=SCORES)
    (plan,) = bench.sent()
    told(bench, plan, ((1, 1, ["b", "c"]),), {1: 7})
    bench.down()
    bench.up(features=SCORES, epoch=2)
    (plan,) = bench.sent()
    assert told(bench, plan, ((1, 1, ["B", "C"]),), {1: 8}) == [Deliver([1], [8], [])]


def test_what_comes_for_one_that_has_ended_is_dropped() -> None:
    bench = bench_of()
    bench.submit(1, (1, 2, 3), needs=SCORES)
    (plan,) = bench.sent()
    bench.end(1)
    assert told(bench, plan, ((1, 1, ["b", "c"]),), {1: 7}) == []


def test_one_that_failed_owes_nothing() -> None:
    bench = bench_of()
    bench.submit(1, (1, 2, 3), needs=SCORES)
    (plan,) = bench.sent()
    effects = told(bench, plan, (), {}, ((1, "not finite"),))
    assert endings_of(effects) == {1: Reason.ENGINE_FAILED}


@pytest.mark.parametrize(
    "prompts",
    [
        (),
        ((1, 1, ["b"]),),
        ((1, 2, ["c", "d"]),),
        ((1, 0, ["a", "b", "c"]),),
        ((1, 1, ["b", "c", "d", "e"]),),
        ((1, 1, ["b", "c"]), (2, 1, ["y"])),
    ],
    ids=["none", "some", "a gap", "the first", "too many", "unasked"],
)
def test_what_cannot_be_true_ends_the_group(prompts: Told) -> None:
    bench = bench_of()
    bench.submit(1, (1, 2, 3), needs=SCORES)
    bench.submit(2, (4, 5))
    (plan,) = bench.sent()
    abandoned = told(bench, plan, prompts, {1: 7, 2: 7})[0]
    assert isinstance(abandoned, Abandon)
    assert "log probabilities of a prompt" in abandoned.detail
