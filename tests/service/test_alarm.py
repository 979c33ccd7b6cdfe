"""The driver's timer rings for the instant that was set last, however often that moved on."""

import asyncio
from collections.abc import Callable

import pytest

from router.alarm import Alarm
from router.driver import monotonic_ms

PATIENCE_S = 10.0
SOON_MS, LATER_MS = 5, 60


class Bell:
    """Remembers when it rang."""

    def __init__(self) -> None:
        self.rang: list[int] = []
        self.heard = asyncio.Event()

    def ring(self) -> None:
        self.rang.append(monotonic_ms())
        self.heard.set()


@pytest.mark.parametrize("instants", [(SOON_MS,), (SOON_MS, LATER_MS), (10_000, SOON_MS)])
async def test_it_rings_once_and_never_too_early(instants: tuple[int, ...]) -> None:
    bell, began_ms = Bell(), monotonic_ms()
    alarm = Alarm(monotonic_ms, bell.ring)
    for instant in instants:
        alarm.set(began_ms + instant)
    await asyncio.wait_for(bell.heard.wait(), PATIENCE_S)
    assert len(bell.rang) == 1
    assert bell.rang[0] >= began_ms + instants[-1]


@pytest.mark.parametrize("silence", [Alarm.stop, lambda alarm: alarm.set(None)])
async def test_it_is_silent_when_nothing_is_due_any_more(silence: Callable[[Alarm], None]) -> None:
    bell, other, began_ms = Bell(), Bell(), monotonic_ms()
    alarm, later = Alarm(monotonic_ms, bell.ring), Alarm(monotonic_ms, other.ring)
    alarm.set(began_ms + SOON_MS)
    later.set(began_ms + LATER_MS)
    silence(alarm)
    await asyncio.wait_for(other.heard.wait(), PATIENCE_S)
    assert bell.rang == []


async def test_moving_the_instant_on_sets_no_other_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), list[float]()
    call_later = loop.call_later

    def counted(delay_s: float, callback: Callable[..., object]) -> asyncio.TimerHandle:
        timers.append(delay_s)
        return call_later(delay_s, callback)

    monkeypatch.setattr(loop, "call_later", counted)
    alarm = Alarm(monotonic_ms, lambda: None)
    for instant in range(100):
        alarm.set(monotonic_ms() + 10_000 + instant)
    alarm.stop()
    assert len(timers) == 1


async def test_it_knows_how_late_it_is() -> None:
    alarm = Alarm(lambda: 0, lambda: None)
    assert alarm.late_ms(5) < 0
    alarm.set(3)
    assert (alarm.late_ms(2), alarm.late_ms(3), alarm.late_ms(5)) == (-1, 0, 2)
    alarm.stop()
