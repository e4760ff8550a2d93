"""Whether calls became slower since a round began: what is certain is seen, and what may be chance is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.control.slowdown import Slowdown, is_slower
from moeserve.observe.call_times import BOUNDS_S, NUM_TIMES, CallTimes

TIMES = st.lists(st.integers(0, 500), min_size=NUM_TIMES, max_size=NUM_TIMES).map(np.array)


def counted(seconds: np.ndarray) -> np.ndarray:
    times = CallTimes()
    for each in seconds:
        times.observe("Forward", "OK", each)
    return np.array(times.counts())


def durations(seed: int, calls: int, shape: str) -> np.ndarray:
    rng = np.random.default_rng(abs(2 * seed + (seed < 0)))
    usual = 0.004 * rng.lognormal(0, 0.5, calls)
    return np.where(rng.random(calls) < 0.013, 0.2, usual) if shape == "some are long" else usual


def test_every_call_is_counted_once_where_it_belongs() -> None:
    times = CallTimes()
    for seconds in (0.0, 1e-4, 1.0001e-4, 5.0, 1e9):
        times.observe("Forward", "OK", seconds)
    times.observe("ForwardStream", "DEADLINE_EXCEEDED", 5.0)
    for method, code in (("Forward", "RESOURCE_EXHAUSTED"), ("Forward", "CANCELLED"), ("GetStats", "OK")):
        times.observe(method, code, 5.0)
    number = next(number for number, bound in enumerate(BOUNDS_S) if bound >= 5.0)
    assert {at: count for at, count in enumerate(times.counts()) if count} == {0: 2, 1: 1, number: 2, NUM_TIMES - 1: 1}
    assert len(times.counts()) == NUM_TIMES and BOUNDS_S[number] == pytest.approx(1.5 * BOUNDS_S[number - 2])


@pytest.mark.parametrize("shape", ["lognormal", "some are long"])
@pytest.mark.parametrize(("before", "during"), [(100, 100), (5000, 100), (5000, 5000)])
def test_a_steady_load_is_as_good_as_never_slower(shape: str, before: int, during: int) -> None:
    loads = ((counted(durations(seed, before, shape)), counted(durations(-seed, during, shape))) for seed in range(1, 101))
    assert sum(is_slower(*load) for load in loads) <= 1


@pytest.mark.parametrize(("calls", "factor"), [(100, 6.0), (500, 3.0), (5000, 2.0)])
def test_what_takes_longer_is_noticed_the_sooner_the_slower_it_is(calls: int, factor: float) -> None:
    before = counted(durations(0, 5000, "lognormal"))
    assert is_slower(before, counted(factor * durations(1, calls, "lognormal")))
    assert not is_slower(before, counted(1.2 * durations(2, calls, "lognormal")))


@given(times=TIMES, more=st.integers(1, 50))
def test_more_calls_of_the_same_kind_are_no_slower(times: np.ndarray, more: int) -> None:
    assert not is_slower(times, more * times)


@given(before=TIMES, during=TIMES, at=st.integers(1, NUM_TIMES - 1), by=st.integers(1, NUM_TIMES))
def test_faster_calls_make_nothing_slower(before: np.ndarray, during: np.ndarray, at: int, by: int) -> None:
    faster = during.copy()
    faster[max(0, at - by)] += faster[at]
    faster[at] = 0
    assert is_slower(before, during) or not is_slower(before, faster)


@given(before=TIMES, few=st.integers(0, 99))
def test_a_few_calls_say_nothing(before: np.ndarray, few: int) -> None:
    slow = few * np.eye(NUM_TIMES, dtype=int)[-1]
    assert not is_slower(before, slow) and not is_slower(slow, before)


def test_rounds_are_compared_with_the_time_between_them() -> None:
    slowdown, fast, slow = Slowdown(60.0), counted(np.full(200, 0.004)), counted(np.full(200, 0.04))
    total = fast
    slowdown.hear({"a": [total]}, 0.0)
    assert slowdown.sentence(0.0) is None, "no round is under way"
    total = total + fast
    slowdown.hear({"a": [total]}, 1.0)
    for now in (1.0, 3.0):  # the slow calls of the first round are not what the second is compared with
        with slowdown.round():
            assert slowdown.sentence(now) is None
            total = total + slow
            slowdown.hear({"a": [total]}, now + 1)
            assert slowdown.sentence(now + 1) == "one call in a hundred takes more than 43.8 ms since the round began, and 4.7 ms before"
        assert slowdown.sentence(now + 1) is None
    with slowdown.round():
        slowdown.hear({"a": [total + fast], "b": [slow]}, 5.0)
        assert slowdown.sentence(5.0) is None, "where another frontend starts from says nothing of now"
