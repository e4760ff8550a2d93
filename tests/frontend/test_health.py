"""What is late for a host, and when it has erred too often."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from moeserve.frontend import timing
from moeserve.frontend.health import Breaker, UsualDurations


def test_nothing_is_late_while_little_is_known() -> None:
    durations = UsualDurations()
    for _ in range(15):
        durations.record(8, 0.01)
    assert durations.late_after_s(8) == inf
    durations.record(8, 0.01)
    assert 0.01 < durations.late_after_s(8) < 0.02
    assert durations.late_after_s(4) == inf, "fewer rows were never seen"
    assert durations.late_after_s(800) > 50 * 0.01, "more rows may take as much longer"


def test_one_slow_pass_in_twenty_is_late() -> None:
    durations = UsualDurations()
    for number in range(200):
        durations.record(1, 0.05 if number % 20 == 0 else 0.002)
    assert durations.late_after_s(1) < 0.01


@given(st.lists(st.floats(1e-4, 10), min_size=16, max_size=200), st.integers(1, 10_000))
def test_a_host_that_lives_is_never_stuck_before_ten_hangs(taken_s: list[float], rows: int) -> None:
    durations = UsualDurations()
    for seconds in taken_s:
        durations.record(rows, seconds)
    assert durations.stuck_after_s(rows, 1.0) >= max(10.0, 20 * min(taken_s))


@given(st.lists(st.floats(0, 30), max_size=20))
def test_the_breaker_opens_after_repeated_errors_within_the_window_only(pauses_s: list[float]) -> None:
    breaker, now, times = Breaker(), 0.0, list[float]()
    for pause_s in pauses_s:
        now += pause_s
        times.append(now)
        was_open, has_opened = breaker.is_open, breaker.error(now)
        latest = times[-timing.BREAKER_ERRORS :]
        assert has_opened == (not was_open and len(latest) == timing.BREAKER_ERRORS and now - latest[0] <= timing.BREAKER_WINDOW_S)
    breaker.close()
    assert not breaker.is_open
