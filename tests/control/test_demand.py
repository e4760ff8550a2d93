"""What callers ask of the experts: nothing is counted twice, and what is old fades."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.control.demand import Demand, differ
from moeserve.errors import InvalidRequest

SIZES = (3, 2)
ASKED = st.lists(st.integers(0, 1000), min_size=sum(SIZES), max_size=sum(SIZES)).map(np.array)


def layers(counts: np.ndarray) -> list[np.ndarray]:
    return [counts[: SIZES[0]].astype(np.int64), counts[SIZES[0] :].astype(np.int64)]


def total(demand: Demand, now: float) -> np.ndarray:
    return np.concatenate(demand.rows(now))


@given(asked=st.lists(st.tuples(st.sampled_from("ab"), ASKED, st.booleans()), max_size=12), start=ASKED)
def test_what_all_frontends_were_asked_counts_once_whichever_reports_arrive(asked: list, start: np.ndarray) -> None:
    demand, since_start = Demand(SIZES, 60.0), {"a": start.copy(), "b": 0 * start}
    demand.hear({name: layers(counts) for name, counts in since_start.items()}, 5.0)
    for name, rows, arrives in [*asked, ("a", 0 * start, True)]:
        since_start[name] = since_start[name] + rows
        if arrives:
            demand.hear({each: layers(counts) for each, counts in since_start.items()}, 5.0)
    assert (total(demand, 5.0) == sum((rows for _, rows, _ in asked), 0 * start)).all(), "not what a frontend had counted before"


@given(rows=ASKED, window_s=st.floats(0.1, 1e4), age_s=st.floats(0, 1e4))
def test_rows_fade(rows: np.ndarray, window_s: float, age_s: float) -> None:
    demand = Demand(SIZES, window_s)
    demand.hear({"a": layers(0 * rows)}, 100.0)
    demand.hear({"a": layers(rows)}, 100.0)
    assert np.allclose(total(demand, 100.0 + age_s), rows * math.exp(-3 * age_s / window_s))


def test_what_was_asked_hours_ago_fades_altogether() -> None:
    demand, rows = Demand(SIZES, 60.0), np.array([100, 1, 10, 7, 3])
    demand.hear({"a": layers(0 * rows)}, 0.0)
    demand.hear({"a": layers(rows)}, 0.0)
    for second in range(14_000, 15_500):
        demand.hear({"a": layers(rows)}, float(second))
        left = total(demand, float(second))
        assert np.allclose(left, rows * left[1]) or not left.all(), "the hot ones stay the hot ones as long as any are"
    assert not left.any()


def test_the_rate_of_a_steady_load() -> None:
    demand, rate = Demand(SIZES, 60.0), np.array([7, 0, 1, 2, 3])
    for second in range(200):
        demand.hear({"a": layers(second * rate)}, float(second))
    assert np.allclose(np.concatenate(demand.rows_per_s(199.0)), rate, rtol=0.05)


def test_a_frontend_that_leaves_takes_nothing_along_and_begins_anew() -> None:
    demand, rows = Demand(SIZES, 60.0), np.array([5, 0, 1, 2, 3])
    demand.hear({"a": layers(0 * rows), "b": layers(9 * rows)}, 0.0)
    demand.hear({"a": layers(rows), "b": layers(10 * rows)}, 0.0)
    demand.hear({"b": layers(11 * rows)}, 0.0)
    demand.hear({"a": layers(rows), "b": layers(11 * rows)}, 0.0)
    demand.hear({"a": layers(2 * rows), "b": layers(0 * rows)}, 0.0)
    assert (total(demand, 0.0) == 4 * rows).all()


ZIPF = np.arange(1, 17) ** -1.2 / (np.arange(1, 17) ** -1.2).sum()


class Load:
    """A second of a load at a time, at random, of one layer of 16 experts; the window is 8 s."""

    def __init__(self, seed: int, rows_per_s: int) -> None:
        self._rng, self._rows_per_s = np.random.default_rng(seed), rows_per_s
        self.demand, self._counted, self.now = Demand([16], 8.0), np.zeros(16, dtype=np.int64), 0
        self.demand.hear({"a": [self._counted]}, 0.0)

    def turns(self, share: np.ndarray, seconds: int) -> list[int]:
        """After how many seconds."""
        turned = []
        for second in range(1, seconds + 1):
            self.now += 1
            self._counted = self._counted + self._rng.poisson(self._rows_per_s * share)
            self.demand.hear({"a": [self._counted]}, float(self.now))
            turned += [second] if self.demand.turned(self.now) else []
        return turned


@pytest.mark.parametrize("rows_per_s", [50, 1000, 10**6])
def test_a_steady_load_never_turns(rows_per_s: int) -> None:
    for seed in range(10):
        assert Load(seed, rows_per_s).turns(ZIPF, 60) == []


@pytest.mark.parametrize("turned", [ZIPF[::-1], np.roll(ZIPF, 4), np.full(16, 1 / 16)], ids=["reversed", "rolled", "even"])
def test_what_was_asked_before_a_turn_counts_no_more(turned: np.ndarray) -> None:
    for seed in range(10):
        load = Load(seed, 10_000)
        assert load.turns(ZIPF, 30) == []
        (after,) = load.turns(turned, 4) or [4]
        rows = load.demand.rows(load.now)[0]
        if after < 4:
            assert np.abs(rows / rows.sum() - turned).sum() / 2 < 0.1, "within half a window"
        else:
            assert np.abs(ZIPF - turned).sum() / 2 < 0.5, "what changes less than half of the rows just fades"


def test_a_load_that_goes_to_and_fro_within_a_window_turns_once_in_it_at_most() -> None:
    load, turns = Load(0, 10_000), list[int]()
    load.turns(ZIPF, 30)
    for number in range(20):
        turns += [3 * number + after for after in load.turns(ZIPF[:: -1 if number % 2 else 1], 3)]
    assert all(later - earlier >= 8 for earlier, later in pairwise(turns))


@given(older=ASKED, latest=ASKED, more=st.integers(1, 10**6))
def test_what_is_alike_does_not_differ(older: np.ndarray, latest: np.ndarray, more: int) -> None:
    assert not differ(older, more * older)
    assert not differ(older, latest) or differ(older, more * latest), "more rows of the same kind make it no less certain"


def test_counts_of_other_layers_are_refused() -> None:
    demand = Demand(SIZES, 60.0)
    demand.hear({"a": layers(np.zeros(5))}, 0.0)
    for counts in ([np.zeros(5, dtype=np.int64)], [np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)], []):
        with pytest.raises(InvalidRequest, match="frontend a counts other experts"):
            demand.hear({"a": counts}, 1.0)
    demand.hear({"a": layers(np.ones(5))}, 0.0)
    assert (total(demand, 0.0) == 1).all()
