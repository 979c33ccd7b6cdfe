"""The waiting line."""

from router.core.events import Submitted
from router.core.state import Sequence
from router.core.waiting import WaitingLine
from tests.core.bench import Bench


def sequence(number: int, arrived_ms: int) -> Sequence:
    return Sequence(Submitted(number, "m", (1,), 1), (arrived_ms, number), [1], 2)


def drain(line: WaitingLine) -> list[int]:
    order = []
    while (head := line.head()) is not None:
        order.append(head.id)
        line.remove(head.id)
    return order


def test_the_line_is_in_order_of_arrival() -> None:
    line = WaitingLine()
    for number, arrived_ms in ((1, 30), (2, 10), (3, 20), (4, 10)):
        line.add(sequence(number, arrived_ms))
    assert len(line) == 4
    assert 3 in line
    assert drain(line) == [2, 4, 3, 1]
    assert len(line) == 0


def test_the_head_stays_until_it_is_removed() -> None:
    line = WaitingLine()
    line.add(sequence(1, 0))
    first = line.head()
    assert first is line.head()
    assert len(line) == 1


def test_who_comes_back_stands_where_it_stood() -> None:
    line = WaitingLine()
    early, late = sequence(1, 0), sequence(2, 5)
    line.add(early)
    line.add(late)
    line.remove(1)
    line.add(early)
    assert drain(line) == [1, 2]


def test_a_crowd_that_leaves_is_forgotten_and_the_others_keep_their_order() -> None:
    line = WaitingLine()
    for number in range(1000):
        line.add(sequence(number, number))
    for number in range(1000):
        if number % 50:
            line.remove(number)
    assert len(line._heap) <= 2 * len(line) + 17
    assert drain(line) == list(range(0, 1000, 50))


def test_deadlines_of_a_crowd_that_leaves_are_forgotten_and_the_others_are_kept() -> None:
    """Not only those that would be next: those of clients with much patience are the last."""
    bench = Bench()
    bench.submit(1, (1, 2), deadline_ms=10)
    bench.submit(2, (1, 2), deadline_ms=500)
    for number in range(3, 1000):
        bench.submit(number, (1, 2), deadline_ms=1000 - number % 7)
        bench.end(number)
        assert len(bench.core._deadlines) < 24
    assert bench.core.wake_at() == 10
    bench.end(1)
    assert bench.core.wake_at() == 500
