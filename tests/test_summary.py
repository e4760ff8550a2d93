"""Quantiles against all the durations that were counted; balance; differences of snapshots."""

from __future__ import annotations

import bisect
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve.observe.call_times import METHODS
from moeserve.observe.metrics import EventLog
from moeserve.observe.stats import Durations, HostShards, LayerStats, ServiceStats
from moeserve.observe.summary import added, balancedness, demand, forwards, host_rows, host_shares, quantile_ms, since

BOUNDS = (0.001, 0.01, 0.1, 1.0)


def counted(seconds: list[float], name: str = "Forward") -> Durations:
    counts = [0] * (len(BOUNDS) + 1)
    for value in seconds:
        counts[bisect.bisect_left(BOUNDS, value)] += 1
    return Durations(name, BOUNDS, counts, sum(seconds))


@given(st.lists(st.floats(1e-6, 5.0), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_in_the_bucket_of_the_true_one(seconds: list[float], q: float) -> None:
    rank = q * len(seconds)
    true = next(value for index, value in enumerate(sorted(seconds), 1) if index >= rank)
    found_ms = quantile_ms(counted(seconds), q)
    edges = (0.0, *BOUNDS)
    bucket = bisect.bisect_left(BOUNDS, true)
    assert found_ms is not None
    if bucket == len(BOUNDS):
        assert found_ms == 1000 * BOUNDS[-1]
    else:
        assert 1000 * edges[bucket] * (1 - 1e-9) <= found_ms <= 1000 * BOUNDS[bucket] * (1 + 1e-9)


def test_nothing_counted_has_no_quantile() -> None:
    assert quantile_ms(counted([]), 0.5) is None
    assert quantile_ms(added([], "all"), 0.5) is None


@given(st.lists(st.floats(1e-6, 5.0)), st.lists(st.floats(1e-6, 5.0)))
def test_snapshots_add_and_subtract(first: list[float], second: list[float]) -> None:
    both = added([counted(first), counted(second)], "Forward")
    assert both.counts == counted(first + second).counts
    (gained,) = since([both], [counted(first)])
    assert gained.counts == counted(second).counts and gained.sum_s == pytest.approx(sum(second))
    assert since([both], [counted(first, "Other")]) == [both]


def test_calls_of_both_protocols_run_tokens() -> None:
    requests = [counted([0.05], name) for name in (*METHODS, "GetStats", "ModelMetadata")]
    assert {one.name for one in forwards(ServiceStats(1, [], [], 0, requests=requests))} == METHODS


def test_rows_expected_on_hosts() -> None:
    """Two copies of expert 0, and expert 1 in two shards: each host of a shard computes all its rows."""
    one = LayerStats("a", 0, [6, 2], [0, 0], placement=[HostShards(0, [0, 1], [0, 0]), HostShards(3, [0], [0])])
    two = LayerStats("b", 0, [0, 4], [0, 0], tensor_parallel=2, placement=[HostShards(0, [1], [0]), HostShards(3, [1], [1])])
    assert host_rows(one, demand(one)) == {0: 5.0, 3: 3.0}
    assert host_shares([one, two], [demand(one), demand(two)]) == {0: 9 / 16, 3: 7 / 16}
    assert host_shares([one], [[0, 0]]) == {}


def test_balancedness() -> None:
    assert balancedness(torch.tensor([3, 3, 3])) == 1
    assert balancedness(torch.tensor([8, 0, 0, 0])) == 0.25
    assert balancedness(torch.zeros(4, dtype=torch.int64)) == 1


def test_a_flood_of_failures_does_not_wash_the_events_away() -> None:
    log = EventLog()
    log.add("host_up", "host-0")
    for _ in range(1000):
        log.add("call_failed", "Forward RESOURCE_EXHAUSTED")
        log.add("call_failed", "Forward INVALID_ARGUMENT")
    assert [(event.subject, event.count) for event in log.latest()] == [
        ("host-0", 1),
        ("Forward RESOURCE_EXHAUSTED", 1000),
        ("Forward INVALID_ARGUMENT", 1000),
    ]
    for number in range(1000):
        log.add("host_lost", f"host-{number}")
    assert len(log.latest()) == 100 and log.latest()[-1].subject == "host-999"


def test_calls_that_fail_in_many_threads_at_once_are_all_told() -> None:
    """As those of an EmbeddedClient: each raises its own error, not one of what counts them."""
    log, interval_s = EventLog(), sys.getswitchinterval()

    def fail(first: int) -> None:
        for number in range(first, first + 300):
            log.add("call_failed", f"Forward {number % 5}")

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for failing in [pool.submit(fail, first) for first in range(8)]:
                failing.result()
    finally:
        sys.setswitchinterval(interval_s)
    assert sum(event.count for event in log.latest()) == 8 * 300
