"""Where a request goes, what it shares, and what makes room for it."""

from dataclasses import replace

import pytest

from router.core.effects import Close
from router.core.events import Reason
from router.core.state import CoreConfig
from tests.core.bench import END, WIDE, Bench, endings_of, tokens_of, work_of

CONFIG = CoreConfig(share_tokens_min=2, reserve_tokens=0, plans_in_flight_max=1)


def tight(kv_tokens: int, page_tokens: int = 1, sequences_max: int = 16) -> Bench:
    bench = Bench(CONFIG)
    bench.up(
        replace(WIDE, kv_tokens=kv_tokens, page_tokens=page_tokens, sequences_max=sequences_max)
    )
    return bench


# --- sharing


@pytest.mark.parametrize(
    ("page", "prompt", "share"),
    [
        (1, (1, 2, 3, 4, 5, 6, 7, 8, 50), 8),
        (1, (1, 2, 3, 4, 50), 4),
        (1, (1, 2, 3, 4), 3),  # one token is left to compute
        (1, (1, 50, 51), 0),  # shorter than share_tokens_min
        (4, (1, 2, 3, 4, 5, 6, 50), 4),  # whole pages only
        (4, (1, 2, 3, 50), 0),
    ],
)
def test_a_finished_request_is_shared_as_far_as_the_prompts_agree(
    page: int, prompt: tuple[int, ...], share: int
) -> None:
    bench = tight(64, page)
    bench.finish(1, (1, 2, 3, 4, 5, 6, 7, 8))
    bench.submit(2, prompt)
    (plan,) = bench.sent()
    (admit,) = plan.admits
    assert (admit.share_from, admit.share_len) == ((1, share) if share else (0, 0))
    assert work_of(plan) == {2: len(prompt) - share}


def test_the_next_turn_of_a_chat_shares_the_answer_too() -> None:
    bench = tight(64)
    bench.submit(1, (1, 2, 3))
    for token in (4, 5, END):
        (plan,) = bench.sent()
        effects = bench.answer(plan, {1: token})
    assert list(endings_of(effects)) == [1]
    bench.submit(2, (1, 2, 3, 4, 5, END, 6, 7))
    (plan,) = bench.sent()
    # The last token was drawn but never computed.
    assert (plan.admits[0].share_from, plan.admits[0].share_len) == (1, 5)


def test_engines_that_cannot_share_are_not_asked_to() -> None:
    bench = Bench(CONFIG)
    bench.up(replace(WIDE, shares_prefix=False))
    for request in (1, 2):
        bench.submit(request, (1, 2, 3, 4))
    (plan,) = bench.sent()
    assert [admit.share_len for admit in plan.admits] == [0, 0]


def test_shared_memory_is_charged_once() -> None:
    bench = tight(100)
    bench.finish(1, tuple(range(40)))
    assert (bench.group().kv_used, bench.group().kv_donors) == (0, 40)
    bench.submit(2, (*range(40), 50, 51), max_tokens=1)
    bench.sent()
    assert (bench.group().kv_used, bench.group().kv_donors) == (2, 40)


def test_who_counted_on_one_that_leaves_computes_it_all_itself() -> None:
    bench = Bench(CONFIG)
    bench.up(replace(WIDE, step_tokens_max=4))
    bench.submit(1, tuple(range(20)))
    bench.submit(2, (*range(12), 50))
    (plan,) = bench.sent()
    assert work_of(plan) == {1: 4}
    bench.end(1)
    bench.answer(plan, {})
    (plan,) = bench.sent()
    assert plan.drops == (1,)
    assert (plan.admits[0].sequence, plan.admits[0].share_len) == (2, 0)
    assert work_of(plan) == {2: 4}


def test_cells_that_one_holds_are_not_charged_to_one_who_waits() -> None:
    bench = Bench(CONFIG)
    bench.up(replace(WIDE, step_tokens_max=10))
    bench.submit(1, tuple(range(16)))
    bench.submit(2, (*range(4), 50, 51))
    bench.submit(3, (*range(12), 60))
    (plan,) = bench.sent()
    bench.answer(plan, {})
    (plan,) = bench.sent()
    # Request 2 holds the first 4 cells of request 1; request 3 waits for 12 of them.
    assert work_of(plan) == {1: 6, 2: 2}
    bench.answer(plan, {2: 70}, ((1, "broken"),))
    (plan,) = bench.sent()
    (admit,) = plan.admits
    assert (admit.sequence, admit.share_from, admit.share_len) == (3, 2, 4)
    # Cells: 6 and the drawn token's for request 2, 13 less the 4 shared for request 3.
    assert bench.group().kv_used == 7 + 9


# --- eviction


def test_donors_make_room_the_least_recently_used_first() -> None:
    bench = tight(30)
    for request, first in ((1, 100), (2, 200), (3, 300)):
        bench.finish(request, tuple(range(first, first + 9)))
    bench.finish(4, (*range(100, 109), 1))  # uses the donor 1, and becomes one of 1 token
    assert bench.group().kv_donors == 28
    bench.submit(5, tuple(range(400, 409)), max_tokens=1)
    (plan,) = bench.sent()
    assert plan.drops == (2,)


def test_a_place_among_the_residents_is_made_like_memory() -> None:
    bench = tight(1000, sequences_max=2)
    bench.finish(1, (1, 2, 3))
    bench.finish(2, (4, 5, 6))
    bench.submit(3, (7, 8, 9))
    assert bench.sent()[0].drops == (1,)


def test_the_donor_that_is_to_be_shared_is_kept() -> None:
    bench = tight(20)
    bench.finish(1, tuple(range(8)))
    bench.finish(2, tuple(range(50, 58)))
    bench.submit(3, (*range(8), *range(100, 106)), max_tokens=2)
    (plan,) = bench.sent()
    assert plan.drops == (2,)
    assert (plan.admits[0].share_from, plan.admits[0].share_len) == (1, 8)


def test_if_nothing_runs_even_the_donor_that_was_to_be_shared_gives_way() -> None:
    bench = tight(20)
    bench.finish(1, tuple(range(15)))
    bench.submit(2, (0, 1, 2, 3, *range(50, 62)), max_tokens=1)
    (plan,) = bench.sent()
    assert plan.drops == (1,)
    assert plan.admits[0].share_len == 0


def test_donors_are_not_evicted_in_vain() -> None:
    bench = tight(20)
    bench.finish(1, tuple(range(8)))
    bench.submit(2, (*range(8), 50), max_tokens=5)
    (plan,) = bench.sent()
    bench.submit(3, tuple(range(100, 114)), max_tokens=1)
    bench.answer(plan, {2: 51})
    (plan,) = bench.sent()
    # The donor's memory is shared by 2, which would inherit it.
    assert plan.drops == ()
    assert bench.group().donors == 1


# --- reservation and preemption


def test_memory_is_reserved_ahead_and_never_beyond_the_end() -> None:
    bench = Bench(replace(CONFIG, reserve_tokens=3))
    bench.up(replace(WIDE, kv_tokens=100, page_tokens=2))
    used = []
    bench.submit(1, (1, 2, 3), max_tokens=7)
    for _ in range(7):
        (plan,) = bench.sent()
        used.append(bench.group().kv_used)
        bench.answer(plan, {1: 5})
    assert used == [6, 6, 6, 6, 10, 10, 10]


def test_the_last_in_line_is_preempted_and_goes_on_where_it_was() -> None:
    bench = tight(12)
    bench.submit(1, (1, 2, 3, 4), max_tokens=8)
    bench.submit(2, (5, 6, 7, 8), max_tokens=8)
    received: dict[int, list[int]] = {1: [], 2: []}
    admitted, dropped = [], []
    for step in range(40):
        plans = bench.sent()
        if not plans:
            break
        (plan,) = plans
        admitted += [admit.sequence for admit in plan.admits]
        dropped += [sequence for sequence in plan.drops if len(received[sequence]) < 8]
        # The scripted engine draws the position, so a token drawn twice would show.
        drawn = {n: len(received[n]) + 20 for n in plan.work_sequences}
        for request, token in tokens_of(bench.answer(plan, drawn)):
            received[request].append(token)
        assert step < 39
    assert admitted == [1, 2, 2]
    assert dropped == [2]
    assert received == {1: list(range(20, 28)), 2: list(range(20, 28))}
    assert bench.core.snapshot().preempted == 1


def test_a_preempted_request_is_admitted_with_all_its_tokens() -> None:
    bench = tight(12)
    bench.submit(1, (1, 2, 3, 4), max_tokens=8)
    bench.submit(2, (5, 6, 7, 8), max_tokens=8)
    for token in (50, 51, 52):
        (plan,) = bench.sent()
        bench.answer(plan, {1: token, 2: token})
    (plan,) = bench.sent()
    assert plan.drops == (2,)
    bench.answer(plan, {1: 53})
    assert endings_of(bench.end(1))
    (plan,) = bench.sent()
    assert (plan.admits[0].tokens, plan.admits[0].prompt_len) == ((5, 6, 7, 8, 50, 51, 52), 4)


# --- choice of a group


def test_a_request_goes_to_the_group_that_holds_most_of_it_else_where_there_is_most_room() -> None:
    bench = Bench(CONFIG)
    bench.up(replace(WIDE, kv_tokens=100), "small")
    bench.up(replace(WIDE, kv_tokens=200), "large")
    bench.submit(1, tuple(range(10)))
    assert [plan.group for plan in bench.sent()] == ["large"]
    bench.submit(2, tuple(range(50, 60)))
    bench.submit(3, (*range(8), 60))
    bench.plan()
    assert (bench.group("small").running, bench.group("large").running) == (0, 3)
    bench.submit(4, tuple(range(100, 190)))
    bench.submit(5, tuple(range(200, 290)))
    bench.plan()
    assert (bench.group("small").running, bench.group("large").running) == (1, 4)


def test_a_full_batch_sends_a_request_elsewhere() -> None:
    bench = Bench(CONFIG)
    bench.up(replace(WIDE, sequences_max=1), "a")
    bench.up(replace(WIDE, sequences_max=1), "b")
    for request in (1, 2, 3):
        bench.submit(request, (1, 2, 3, request))
    assert sorted(plan.group for plan in bench.sent()) == ["a", "b"]
    assert bench.core.snapshot().waiting == 1


def test_a_request_goes_only_where_its_needs_are_met() -> None:
    bench = Bench(CONFIG)
    bench.up(WIDE, "plain")
    bench.up(replace(WIDE, kv_tokens=50), "able", features=("grammar",))
    bench.submit(1, (1, 2), needs=("grammar",))
    assert [plan.group for plan in bench.sent()] == ["able"]


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [("", "", 4), ("verse", "verse", 4), ("", "verse", 0), ("verse", "", 0), ("prose", "verse", 0)],
)
def test_only_sequences_with_one_adapter_share(first: str, second: str, share: int) -> None:
    bench = Bench(CONFIG)
    bench.up(adapters=("prose", "verse"))
    bench.finish(1, (1, 2, 3, 4), first)
    bench.submit(2, (1, 2, 3, 4, 5), adapter=second)
    (plan,) = bench.sent()
    assert [(admit.adapter, admit.share_len) for admit in plan.admits] == [(second, share)]


def test_a_request_goes_only_where_its_adapter_is() -> None:
    bench = Bench(CONFIG)
    bench.up(WIDE, "plain")
    bench.up(replace(WIDE, kv_tokens=50), "able", adapters=("verse",))
    bench.submit(1, (1, 2), adapter="verse")
    assert [plan.group for plan in bench.sent()] == ["able"]


def test_an_adapter_that_no_group_has_is_refused_by_name() -> None:
    bench = Bench(CONFIG)
    bench.up(adapters=("verse",))
    detail = "no worker that is up has the adapter prose"
    assert bench.submit(1, (1, 2), adapter="prose") == [Close(1, Reason.UNSUPPORTED, detail)]


def test_of_the_groups_with_the_adapter_none_may_be_large_enough() -> None:
    bench = Bench(CONFIG)
    bench.up(WIDE, "large")
    bench.up(replace(WIDE, length_max=6), "small", adapters=("verse",))
    (close,) = bench.submit(1, (1, 2, 3), max_tokens=5, adapter="verse")
    detail = "prompt and answer may have 8 tokens, but a worker holds 6"
    assert close == Close(1, Reason.TOO_LONG, detail)


def test_donors_beyond_what_is_worth_keeping_go_and_the_latest_stays() -> None:
    bench = Bench(CONFIG)
    bench.up(replace(WIDE, donor_tokens_max=20))
    for request in (1, 2, 3):
        bench.finish(request, tuple(range(100 * request, 100 * request + 9)))
    assert (bench.group().donors, bench.group().kv_donors) == (2, 18)
    bench.finish(4, tuple(range(500, 530)))
    assert (bench.group().donors, bench.group().kv_donors) == (1, 30)
