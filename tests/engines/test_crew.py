"""Rows that several threads share out: each done once, whoever does it."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shards import crew
from shards.allowed import Words
from shards.crew import ROWS_MIN, Crew, default_threads
from shards.engines.base import SamplingParams
from shards.sampling import Drawn, Sampler
from tests.engines.test_sampling import Row

VOCAB = 1500
SAMPLED = SamplingParams(temperature=1.0, seed=7)
KINDS = (
    SamplingParams(),
    SAMPLED,
    replace(SAMPLED, top_p=0.9, logprobs=True, top_logprobs=5),
    replace(SAMPLED, top_k=20, min_p=0.02),
    replace(SAMPLED, typical_p=0.8, logit_bias=((4, 3.0), (9, -100.0))),
    replace(SAMPLED, top_p=0.95, frequency_penalty=0.4, repetition_penalty=1.2, logprobs=True),
    SamplingParams(temperature=0.0, presence_penalty=0.5, logprobs=True, ranks=True),
)
THREADS = (1, 2, 5)


class Watched:
    """A constraint that allows even tokens, and remembers which thread asks."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def allowed(self) -> Words:
        self.threads.add(threading.get_ident())
        return np.full(-(-VOCAB // 32), 0x55555555, np.uint32)


def rows_of(guide: Watched | None = None) -> list[Row]:
    rows = [
        Row(replace(KINDS[number % len(KINDS)], seed=number), tokens=[5, 6, 7, number])
        for number in range(40)
    ]
    if guide is not None:
        rows[3].guide = rows[20].guide = guide
    return rows


def drawn_by(threads: int, steps: int = 3) -> list[Drawn]:
    """Several steps of the same sequences, some of which have no finite logits."""
    sampler, rows, made = Sampler(VOCAB, threads), rows_of(Watched()), []
    noise = np.random.default_rng(1)
    try:
        for _ in range(steps):
            logits = (3 * noise.standard_normal((len(rows), VOCAB))).astype(np.float32)
            logits[[2, 17]] = np.nan
            made.append(sampler.draw(logits, rows))
            for row, token in zip(rows, made[-1].tokens, strict=True):
                row.tokens.append(token)
    finally:
        sampler.close()
    return made


@pytest.mark.parametrize("threads", THREADS[1:])
def test_how_many_threads_draw_changes_nothing(threads: int) -> None:
    alone, together = drawn_by(1), drawn_by(threads)
    assert together == alone
    assert all(drawn.failures.keys() == {2, 17} for drawn in together)
    assert any(drawn.logprobs for drawn in together)


def test_a_constraint_is_asked_by_the_engines_thread_alone() -> None:
    guide, sampler = Watched(), Sampler(VOCAB, 3)
    rows = rows_of(guide)
    drawn = sampler.draw(np.zeros((len(rows), VOCAB), np.float32), rows)
    sampler.close()
    assert guide.threads == {threading.get_ident()}
    assert all(drawn.tokens[index] % 2 == 0 for index in (3, 20))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 41])
@pytest.mark.parametrize("threads", THREADS)
def test_every_row_is_done_once(threads: int, count: int) -> None:
    made, done, members = Crew(threads), [], {}

    def work(member: int, rows: Sequence[int]) -> None:
        members.setdefault(member, set()).add(threading.get_ident())
        done.extend(rows)

    made.deal(work, range(count), [100, 101])
    made.close()
    assert sorted(done) == [*range(count), 100, 101]
    assert members[0] == {threading.get_ident()}
    assert len(members) == max(1, min(threads, count // ROWS_MIN))


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_is_raised_when_everybody_has_ended(fails: int) -> None:
    """Nobody may still read logits of which the caller thinks that they are free."""
    made, gate, ended = Crew(2), threading.Event(), []

    def work(member: int, _rows: Sequence[int]) -> None:
        if member == fails:
            gate.set()
            raise ValueError("a bug")
        assert gate.wait(30)
        ended.append(member)

    with pytest.raises(ValueError, match="a bug"):
        made.deal(work, range(2 * ROWS_MIN))
    assert ended == [1 - fails]
    made.close()


def test_closing_ends_the_threads() -> None:
    sampler = Sampler(VOCAB, 4)
    rows = rows_of()
    sampler.draw(np.zeros((len(rows), VOCAB), np.float32), rows)
    helpers = [thread for thread in threading.enumerate() if thread.name.startswith("crew")]
    assert helpers
    sampler.close()
    sampler.close()
    assert not any(thread.is_alive() for thread in helpers)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (96, 4)])
def test_few_cores_have_no_thread_to_spare(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr(crew, "usable_cores", lambda: cores)
    assert default_threads() == threads
