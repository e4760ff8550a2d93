"""The plan: complete, apart, within limits, the same when made again, and moving little.

E experts, D hosts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError
from moeserve.config import PlacementConfig
from moeserve.placement import (
    Constraints,
    HostLimits,
    LayerSize,
    Placement,
    balancedness,
    constraints_of,
    plan,
    plan_placement,
    transition,
)
from tests.placement.clusters import Case, assert_kept, cases, constraints_on, hosts_of, pairs, rows_of, sizes_of, zipf
from tests.placement.layers import STRATEGIES, spec_of


@given(case=cases(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_a_plan_keeps_to_its_constraints_and_is_its_own_successor(case: Case, seed: int) -> None:
    try:
        first = plan(case.sizes, case.constraints, case.demand)
    except ConfigError as error:
        assert any(reason in str(error) for reason in ("cannot be placed", "would hold no expert", "at most one per host"))
        return
    assert_kept(case, first)
    assert plan(case.sizes, case.constraints, case.demand, first) is first
    drawn = np.random.default_rng(seed)
    other = [rows_of(drawn, len(copies)) for copies in case.constraints.least_copies]
    second = plan(case.sizes, case.constraints, other, first)
    assert_kept(case, second)
    assert plan(case.sizes, case.constraints, other, second) is second


@given(case=cases(is_bounded=False), data=st.data())
@settings(deadline=None, max_examples=100)
def test_hosts_that_come_and_go_move_only_what_they_must(case: Case, data: st.DataObject) -> None:
    limits = replace(case.constraints, pipeline_stages=1)
    before = plan(case.sizes, limits, case.demand)
    gone = data.draw(st.sampled_from(limits.hosts))
    if len(limits.hosts) > max(2, limits.tensor_parallel):
        left = tuple(host for host in limits.hosts if host != gone)
        fewer = replace(limits, hosts=left, most_copies=tuple(np.maximum(each, 2) for each in limits.most_copies))
        after = plan(case.sizes, fewer, None, before)
        assert_kept(replace(case, constraints=fewer), after)
        assert {pair for pair in pairs(before) if pair[2] != gone.number} <= pairs(after)
        assert len(pairs(after)) <= len(pairs(before))
        limits, before = fewer, after
    more = replace(limits, hosts=(*limits.hosts, HostLimits(99)))
    if min(len(each) for each in limits.least_copies) >= len(more.hosts):
        after = plan(case.sizes, more, None, before)
        assert_kept(replace(case, constraints=more), after)
        assert {pair[2] for pair in pairs(after) - pairs(before)} == {99}
        assert len(pairs(after)) == len(pairs(before))


@given(
    capacity=st.lists(st.integers(0, 8), min_size=1, max_size=6), copies=st.lists(st.integers(1, 4), min_size=1, max_size=8), data=st.data()
)
@settings(deadline=None, max_examples=200)
def test_what_could_be_placed_is_placed(capacity: list[int], copies: list[int], data: st.DataObject) -> None:
    """Of one layer of equal experts (Gale and Ryser 1957): D columns sums, E row sums."""
    size = LayerSize("layer 0", np.full(len(copies), 10))
    hosts = tuple(HostLimits(number, 10 * room + 5) for number, room in enumerate(capacity))
    limits = Constraints(hosts, (np.array(copies),), (np.maximum(copies, len(hosts)),), extra_copies=data.draw(st.sampled_from([0.0, 1.0])))
    rows = data.draw(st.none() | st.lists(st.floats(0, 9), min_size=len(copies), max_size=len(copies)))
    demand = None if rows is None else [np.array(rows)]
    ordered = sorted(copies, reverse=True)
    fits = all(sum(ordered[:k]) <= sum(min(room, k) for room in capacity) for k in range(1, len(copies) + 1)) and max(copies) <= len(hosts)
    if fits and min(capacity) > 0 and sum(copies) >= len(hosts):
        placed = plan([size], limits, demand)
        assert_kept(Case([size], limits, demand), placed)
        # Another host of the same room takes the place of the first: everything must fit again, whatever is kept.
        replaced = replace(limits, hosts=(*hosts[1:], replace(hosts[0], number=9)))
        assert_kept(Case([size], replaced, demand), plan([size], replaced, demand, placed))
    elif not fits:
        with pytest.raises(ConfigError, match=r"cannot be placed|allowed: at most one per host"):
            plan([size], limits, demand)


@given(shards=st.integers(2, 4), experts=st.integers(2, 6), extra=st.integers(0, 3), data=st.data())
@settings(deadline=None)
def test_shards_find_hosts_for_any_number_of_copies(shards: int, experts: int, extra: int, data: st.DataObject) -> None:
    """Also where the host that one shard likes best is the only one for another."""
    hosts, placed = hosts_of(*range(shards + extra)), None
    sizes = [LayerSize("a", np.full(experts * shards, 10))]
    for _ in range(3):
        copies = np.array(data.draw(st.lists(st.integers(1, min(3, len(hosts))), min_size=experts, max_size=experts)))
        limits = Constraints(tuple(hosts), (copies,), (copies,), tensor_parallel=shards)
        demand = [rows_of(np.random.default_rng(data.draw(st.integers(0, 99))), experts)]
        try:
            placed = plan(sizes, limits, demand, placed)
        except ConfigError as error:
            assert "would hold no expert" in str(error)
            return
        assert_kept(Case(sizes, limits, demand), placed)


@given(experts=st.lists(st.integers(1, 40), min_size=1, max_size=4), strategy=STRATEGIES, data=st.data())
@settings(deadline=None)
def test_without_load_or_a_placement_experts_are_dealt_out(experts: list[int], strategy: str, data: st.DataObject) -> None:
    config = PlacementConfig(
        num_hosts=data.draw(st.integers(1, max(experts))), strategy=strategy, pipeline_stages=1 if min(experts) < 9 else len(experts)
    )
    specs = [spec_of(number) for number in experts]
    hosts = hosts_of(*range(int(config.num_hosts)))
    if len(hosts) < config.pipeline_stages:
        return
    sizes = [LayerSize(spec.name, np.full(spec.num_experts, 10)) for spec in specs]
    try:
        dealt = plan_placement(specs, config)
    except ConfigError:
        return
    assert pairs(plan(sizes, constraints_of(specs, config, hosts), None)) == pairs(dealt)


def test_one_more_host_takes_its_share_and_nothing_else_moves() -> None:
    sizes = sizes_of(58, 256)
    before = plan(sizes, constraints_on(sizes, hosts_of(*range(32))))
    after = plan(sizes, constraints_on(sizes, hosts_of(*range(33))), None, before)
    change = transition(sizes, before, after)
    share = 58 * 256 * 10 / 33
    assert (change.moves, change.new, change.kept) == (449, 0, 58 * 256 - 449)
    assert change.moved_bytes == 4490
    assert max(change.peak_bytes.values()) <= 1.1 * share
    held = np.bincount(np.concatenate([layer.host_of_physical for layer in after.layers]))
    assert held.max() - held.min() <= 1
    assert all(np.ptp(np.bincount(layer.host_of_physical)) <= 1 for layer in after.layers)


@pytest.mark.parametrize("load", ["unknown", "zipf"])
def test_a_lost_host_moves_only_its_experts(load: str) -> None:
    sizes, hosts = sizes_of(58, 256), hosts_of(*range(32))
    demand = None if load == "unknown" else zipf(58, 256, 0.4)
    limits = replace(constraints_on(sizes, hosts), extra_copies=0.25, min_gain=1.0)
    before = plan(sizes, limits, demand)
    after = plan(sizes, replace(limits, hosts=(*hosts[:5], *hosts[6:])), demand, before)
    change = transition(sizes, before, after)
    assert (change.moves, change.new) == (sum(pair[2] == 5 for pair in pairs(before)), 0)
    assert {pair for pair in pairs(before) if pair[2] != 5} <= pairs(after)


def test_hosts_are_balanced_in_one_go_and_then_left_alone() -> None:
    sizes, demand = sizes_of(1, 16), zipf(1, 16, 1.2)
    limits = replace(constraints_on(sizes, hosts_of(0, 3, 4, 8)), extra_copies=0.5)
    before = plan(sizes, limits)
    after = plan(sizes, limits, demand, before)
    assert balancedness(before, demand) < 0.6
    assert balancedness(after, demand) > 0.95
    drawn = np.random.default_rng(0)
    for _ in range(20):
        noisy = [rows * drawn.normal(1, 0.02, len(rows)) for rows in demand]
        assert plan(sizes, limits, noisy, after) is after
    turned = [rows[::-1] for rows in demand]
    assert balancedness(after, turned) < 0.7
    assert balancedness(plan(sizes, limits, turned, after), turned) > 0.9


def test_named_copies_are_exact_and_others_follow_the_load() -> None:
    spec = spec_of(8)
    config = PlacementConfig(num_hosts=4, copies={spec.name: {"0": 3, "7": 1}})
    limits = replace(constraints_of([spec], config, hosts_of(*range(4))), extra_copies=1.0)
    rows = np.array([1.0, 1, 1, 1, 1, 1, 30, 90])
    layer = plan(sizes_of(1, 8), limits, [rows]).layers[0]
    copies = np.bincount(layer.unit_of_physical)
    assert (copies[0], copies[7], copies[6], copies.sum()) == (3, 1, 4, 16)


def test_copies_stand_on_several_nodes_also_after_changes() -> None:
    sizes = sizes_of(3, 24)
    hosts = [HostLimits(number, node="ab"[number // 4]) for number in range(8)]
    limits = replace(constraints_on(sizes, hosts, copies=2), extra_copies=1.5)
    drawn = np.random.default_rng(1)
    placement: Placement | None = None
    for _ in range(4):
        placement = plan(sizes, limits, [drawn.lognormal(0, 1.5, 24) for _ in sizes], placement)
        for layer in placement.layers:
            for unit in range(24):
                nodes = layer.host_of_physical[layer.unit_of_physical == unit] // 4
                assert set(nodes.tolist()) == {0, 1}


def test_hosts_of_unequal_memory_get_what_fits() -> None:
    sizes = sizes_of(4, 16)
    hosts = [HostLimits(0, 100), HostLimits(1, 300), HostLimits(2, 300)]
    limits = constraints_on(sizes, hosts)
    assert_kept(Case(sizes, limits, None), plan(sizes, limits))
    with pytest.raises(ConfigError, match=r"expert \d+ of layer layer \d cannot be placed in 1 copy: 0 of 3 hosts .* room for 10 bytes"):
        plan(sizes, replace(limits, hosts=(*hosts[:2], HostLimits(2, 230))))


def test_more_hosts_than_physical_experts_are_refused() -> None:
    sizes = sizes_of(2, 4)
    with pytest.raises(
        ConfigError, match=r"placement\.num_hosts is 9, but no layer has enough experts for that many: 1 of them would have none"
    ):
        plan(sizes, constraints_on(sizes, hosts_of(*range(9))))
