"""Simulated calls against what can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeserve.bench.costs import Costs
from moeserve.bench.curve import Curve, growing
from moeserve.placement import LayerPlacement, Placement
from moeserve.simulate import Calls, Workload, simulated_calls
from moeserve.simulate.cores import Cores
from moeserve.simulate.work import LayerWork

COSTS = Costs(
    hidden_size=8,
    intermediate_size=8,
    call_s=Curve.line(1e-3, 1e-5),
    batch_s=Curve.line(5e-4, 1e-5),
    hop_s=1e-4,
    sent_row_s=1e-5,
    summed_row_s=1e-5,
    pass_s=1e-3,
    expert_s=Curve.line(2e-3, 1e-4),
)
SIZES = np.array([0.0, 1, 7, 1000])
#: nothing but rows of experts costs anything that counts
FREE = Curve.line(1e-9, 0)
ROWS_ONLY = Costs(8, 8, FREE, FREE, *([1e-9] * 4), Curve.line(0, 1e-3))


def calls(hosts: int, experts: int, workload: Workload, costs: Costs, shares: list[float] | None = None, cores: int | None = None) -> Calls:
    """Experts in equal numbers on the hosts, all on one node; each token chooses one."""
    layer = LayerPlacement.of(hosts, np.arange(experts), np.arange(experts) * hosts // experts)
    work = LayerWork(layer, np.array(shares or [1 / experts] * experts), 1, costs, "least_outstanding")
    return simulated_calls(
        Placement(1, hosts, (layer,)), [work], workload, Cores(dict.fromkeys(range(hosts), "node-0"), cores), costs, seed=0
    )


def test_a_single_caller_waits_for_the_sum_of_the_costs() -> None:
    found = calls(1, 1, Workload(10, 1, 1), COSTS)
    expected_s = 1e-3 + 10 * 1e-5 + 5e-4 + 10 * 1e-5 + 1e-4 + 10 * 1e-5 + (1e-3 + 2e-3 + 10 * 1e-4) + 10 * 1e-5
    assert found.latencies_s == pytest.approx(expected_s)
    assert found.tokens_per_s == pytest.approx(10 / expected_s)
    assert found.p99_ms == pytest.approx(1e3 * expected_s)


def test_experts_that_take_no_time_of_their_own_are_in_a_pass() -> None:
    """As measured costs say it of small ones."""
    found = calls(2, 2, Workload(10, 1, 1), replace(ROWS_ONLY, pass_s=1e-3, expert_s=Curve.line(0, 0)))
    assert found.latencies_s == pytest.approx(1e-3, rel=0.01) and found.busy == pytest.approx(1, rel=0.01)


def test_calls_take_longer_by_chance_as_they_did_when_measured() -> None:
    costs = replace(ROWS_ONLY, spread=(*[0.9] * 98, 4.0, 7.8))
    found = calls(1, 1, Workload(10, 1, 1), costs)
    assert np.unique(np.round(found.latencies_s, 6)).tolist() == pytest.approx([0.009, 0.04, 0.078])
    assert found.p99_ms == pytest.approx(40, rel=0.01) or found.p99_ms == pytest.approx(78, rel=0.01)


def test_hosts_with_cores_of_their_own_share_the_work() -> None:
    one, four = (calls(hosts, 8, Workload(64, 8, 1), ROWS_ONLY) for hosts in (1, 4))
    assert one.tokens_per_s == pytest.approx(1000, rel=0.01)
    assert 3000 < four.tokens_per_s <= 4000
    assert one.busy == pytest.approx([1], abs=0.01)


def test_hosts_beyond_the_cores_of_their_node_add_nothing() -> None:
    two, eight = (calls(hosts, 8, Workload(64, 8, 1), ROWS_ONLY, cores=2) for hosts in (2, 8))
    assert two.tokens_per_s < 2000 * 1.01 and eight.tokens_per_s < 2000 * 1.01
    assert eight.tokens_per_s > 0.95 * two.tokens_per_s


def test_what_a_frontend_does_is_missing_to_the_hosts_on_its_core() -> None:
    costs = replace(ROWS_ONLY, batch_s=Curve.line(32e-3, 0))
    alone, shared = (calls(1, 8, Workload(64, 1, 1), costs, cores=cores) for cores in (None, 1))
    assert shared.tokens_per_s == pytest.approx(alone.tokens_per_s, rel=0.01), "one caller: it is the one or the other's turn"
    alone, shared = (calls(1, 8, Workload(64, 2, 1, 64), costs, cores=cores) for cores in (None, 1))
    assert alone.tokens_per_s == pytest.approx(64 / 64e-3, rel=0.05)
    assert shared.tokens_per_s == pytest.approx(64 / 96e-3, rel=0.05)


def test_the_busiest_host_decides() -> None:
    even, skewed = (calls(4, 4, Workload(64, 8, 1), ROWS_ONLY, shares) for shares in ([0.25] * 4, [0.7, 0.1, 0.1, 0.1]))
    assert skewed.tokens_per_s == pytest.approx(1000 / 0.7, rel=0.05)
    assert skewed.busy[0] == pytest.approx(1, abs=0.02) and skewed.busy[1] == pytest.approx(1 / 7, rel=0.1)
    assert skewed.p99_ms > even.p99_ms


def test_waiting_requests_are_joined() -> None:
    """Experts are read once for a batch, not once for a request."""
    costs = replace(ROWS_ONLY, expert_s=Curve.line(10e-3, 1e-9))
    single, joined = (calls(1, 1, Workload(16, 8, 1, most), costs) for most in (16, 8192))
    assert single.tokens_per_s == pytest.approx(16 / 10e-3, rel=0.01)
    assert joined.tokens_per_s > 2.5 * single.tokens_per_s


def test_requests_by_the_clock_go_to_all_frontends() -> None:
    """As many to each: nobody waits longer than at one frontend with its share of the requests."""
    costs = replace(ROWS_ONLY, call_s=Curve.line(10e-3, 0))
    one, four = (calls(1, 1, Workload(1, 1, frontends, 1, rate=190 * frontends), costs) for frontends in (1, 4))
    assert four.latencies_s.mean() < one.latencies_s.mean()


def test_costs_follow_the_sizes_of_experts() -> None:
    wide = COSTS.scaled(16, 24)
    assert wide.expert_s.at(SIZES) == pytest.approx(6 * COSTS.expert_s.at(SIZES))
    assert wide.call_s.at(SIZES) == pytest.approx(1e-3 + 2e-5 * SIZES)
    assert wide.sent_row_s == pytest.approx(2 * COSTS.sent_row_s) and wide.hop_s == COSTS.hop_s


def test_a_curve_goes_through_what_was_measured_and_on() -> None:
    curve = growing([1, 1.1, 4, 8, 16], [2e-3, 4e-3, 5e-3, 4.5e-3, 21e-3], least_step=1.2)
    assert curve.at(np.array([0, 1.05, 4, 6, 8, 12, 16, 32])) == pytest.approx(
        [3e-3, 3e-3, 4.75e-3, 4.75e-3, 4.75e-3, 12.875e-3, 21e-3, 53.5e-3]
    )
    assert Curve(((4, 8e-3),)).seconds(2) == pytest.approx(8e-3), "one point: no less below it, and in proportion beyond"
    assert Curve(((4, 8e-3),)).seconds(8) == pytest.approx(16e-3)
