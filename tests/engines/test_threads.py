"""The thread count as a function of what others use; no test depends on the machine's load."""

import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from shards.engines import threads
from shards.engines.threads import Choice, Load, ThreadControl, choose, others


def settle(choice: Choice, cores: int, taken: float, looks: int) -> list[int]:
    seen = []
    for _ in range(looks):
        choice = choose(choice, cores, taken)
        seen.append(choice.threads)
    return seen


def settled(threads: int, taken: float) -> Choice:
    """After a neighbour became busy beside a count that had lasted."""
    return choose(Choice(threads), threads, taken)


def test_an_idle_machine_gives_all_cores() -> None:
    assert settle(Choice(2), 2, 0.0, 5) == [2] * 5
    assert settle(Choice(2), 2, 0.2, 5) == [2] * 5


def test_a_busy_neighbour_costs_a_thread_at_once() -> None:
    """Three threads on two cores get two thirds each, so 0.67 is what a busy neighbour shows."""
    assert settle(Choice(2), 2, 0.67, 1) == [1]
    assert settle(Choice(2), 2, 1.0, 1) == [1]
    assert settle(Choice(8), 8, 2.7, 1) == [5]


def test_a_thread_comes_back_after_one_calm_look() -> None:
    """A program that started, or ended, is no reason to compute with less for seconds."""
    assert settle(settled(2, 1.0), 2, 0.1, 3) == [2, 2, 2]


def test_who_went_up_too_early_waits_twice_as_long_each_time() -> None:
    choice = settled(2, 1.0)
    waited = []
    for _ in range(5):
        looks = 0
        while choice.threads == 1:
            choice, looks = choose(choice, 2, 0.1), looks + 1
        waited.append(looks)
        choice = choose(choice, 2, 1.0)
    assert waited == [1, 2, 4, 8, 8]


def test_patience_ends_with_a_count_that_lasted() -> None:
    choice = settled(2, 1.0)
    for _ in range(2):
        while choice.threads == 1:
            choice = choose(choice, 2, 0.1)
        choice = choose(choice, 2, 1.0)
    assert settle(choice, 2, 0.1, 4) == [1, 1, 1, 2]
    for _ in range(4 + threads.LOOKS_STEADY):
        choice = choose(choice, 2, 0.1)
    assert settle(choose(choice, 2, 1.0), 2, 0.1, 1) == [2]


def test_calm_must_be_unbroken() -> None:
    choice = choose(settled(2, 1.0), 2, 0.1)
    choice = choose(choice, 2, 1.0)  # too early: now two looks must agree
    for taken in (0.1, 0.5, 0.1):
        choice = choose(choice, 2, taken)
    assert choice.threads == 1
    assert choose(choice, 2, 0.1).threads == 2


def test_between_the_bounds_nothing_changes() -> None:
    assert settle(Choice(1), 2, 0.4, 9) == [1] * 9
    assert settle(Choice(2), 2, 0.4, 9) == [2] * 9


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("taken", [0.0, 0.5, 1.0, 3.3, 64.0, 1000.0])
def test_the_count_stays_within_the_machine(cores: int, taken: float) -> None:
    for start in (1, cores):
        assert all(1 <= count <= cores for count in settle(Choice(start), cores, taken, 9))


def test_own_time_is_not_counted_as_others() -> None:
    before = Load(at_s=10.0, busy_s=100.0, own_s=50.0)
    after = Load(at_s=11.0, busy_s=102.0, own_s=51.5)
    assert others(before, after) == pytest.approx(0.5)
    # The clocks tick differently: a process may seem to use more than the machine did.
    assert others(before, replace(after, own_s=53.0)) == 0.0
    assert others(before, replace(after, at_s=10.0)) == 0.0


def counters(monkeypatch: pytest.MonkeyPatch, taken: float, cores: int = 2) -> None:
    """Others keep so many cores busy, from one look to the next."""
    seconds = count()
    monkeypatch.setattr(
        threads, "read_load", lambda: Load(at := float(next(seconds)), at * taken, 0.0)
    )
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)


def test_control_follows_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    counters(monkeypatch, 1.0)
    control = ThreadControl()
    assert control.threads == 2
    control.look()
    assert control.threads == 1
    counters(monkeypatch, 0.0)
    for _ in range(4):
        control.look()
    assert control.threads == 2


def test_control_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    counters(monkeypatch, 1.0)
    monkeypatch.setattr(threads, "LOOK_S", 0.001)
    control = ThreadControl()
    control.start()
    began = time.monotonic()
    while control.threads != 1:
        assert time.monotonic() - began < 20
        time.sleep(0.001)
    control.close()


def test_a_pinned_count_stays() -> None:
    before = threading.active_count()
    control = ThreadControl(7)
    control.start()
    assert control.threads == 7
    assert threading.active_count() == before
    control.close()


def test_a_system_without_counters_uses_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "read_load", lambda: None)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    control = ThreadControl()
    control.start()
    control.look()
    assert control.threads == 4
    control.close()


def test_counters_can_be_read_where_there_are_any() -> None:
    assert threads.usable_cores() >= 1
    load = threads.read_load()
    if Path("/proc/stat").exists():
        assert load is not None
        assert load.busy_s > 0
