"""What a change moves, what hosts hold meanwhile, and the steps it is cut into."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.placement import (
    HostLimits,
    LayerPlacement,
    LayerSize,
    Memory,
    Placement,
    peak_bytes,
    plan,
    read_bytes,
    steps,
    transition,
    without_surplus,
)
from tests.placement.clusters import Case, cases, constraints_on, hosts_of, pairs, rows_of, sizes_of, zipf


def placed(*hosts_of_units: list[int]) -> Placement:
    """One layer: the hosts of each unit."""
    units = np.repeat(np.arange(len(hosts_of_units)), [len(hosts) for hosts in hosts_of_units])
    return Placement(1, 9, (LayerPlacement.of(9, units, np.concatenate(hosts_of_units)),))


def test_a_change_is_counted_in_experts_and_bytes() -> None:
    sizes = [LayerSize("layer 0", np.array([10, 20, 40]), shared_bytes=1)]
    change = transition(sizes, placed([0], [0, 1], [2]), placed([0, 1], [2, 1], [2]))
    # Expert 1 left host 0 and came back on host 2; expert 0 has one copy more.
    assert (change.moves, change.new, change.kept, change.moved_bytes) == (1, 1, 3, 30)
    assert change.peak_bytes == {0: 31, 1: 31, 2: 61}


@given(case=cases(is_bounded=False), seed=st.integers(0, 2**32), limit=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_steps_lead_there_and_never_leave_an_expert_without_copies(case: Case, seed: int, limit: int) -> None:
    before = plan(case.sizes, case.constraints, case.demand)
    drawn = np.random.default_rng(seed)
    moved = replace(case.constraints, hosts=(*case.constraints.hosts[1:], HostLimits(50)))
    demand = [rows_of(drawn, len(copies)) for copies in case.constraints.least_copies]
    after = plan(case.sizes, moved, demand, before)
    made = steps(case.sizes, before, after, limit)
    assert not steps(case.sizes, after, after, limit)
    assert pairs(made[-1]) == pairs(after)
    assert steps(case.sizes, before, after, None)[-1] is after
    largest = max(int(size.unit_bytes.max()) for size in case.sizes)
    copies = [Counter(pair[:2] for pair in pairs(placement)) for placement in (before, after)]
    for one, two in pairwise([before, *made]):
        assert transition(case.sizes, one, two).moved_bytes <= max(limit, largest)
        held = Counter(pair[:2] for pair in pairs(two))
        assert all(held[unit] >= min(copies[0][unit], copies[1][unit]) for unit in copies[0])
    assert (
        sum(transition(case.sizes, *two).moved_bytes for two in pairwise([before, *made]))
        == transition(case.sizes, before, after).moved_bytes
    )


@given(case=cases(is_bounded=False), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_what_hosts_give_away_before_they_get_leaves_every_expert_where_it_lives(case: Case, seed: int) -> None:
    before = plan(case.sizes, case.constraints, case.demand)
    drawn = np.random.default_rng(seed)
    stay = (*case.constraints.hosts[1:], HostLimits(50))
    demand = [rows_of(drawn, len(copies)) for copies in case.constraints.least_copies]
    after = plan(case.sizes, replace(case.constraints, hosts=stay), demand, before)
    down = {host.number for host in case.constraints.hosts if host.number == case.constraints.hosts[0].number or drawn.random() < 0.2}
    thinned = without_surplus(before, after, down)
    old, new, held = (pairs(placement) for placement in (before, after, thinned))
    units, up = ({pair[:2] for pair in old if pair[2] not in without} for without in ((), down))
    assert old & new <= held <= old
    assert {pair for pair in held if pair[2] in down} == {pair for pair in old if pair[2] in down}, "one that still answers does it right"
    assert {pair[:2] for pair in held} == units
    assert {pair[:2] for pair in held if pair[2] not in down} == up
    stays = {pair[:2] for pair in old & new if pair[2] not in down}
    assert not {pair for pair in held - new if pair[:2] in stays and pair[2] not in down}, "all others make room"


def test_in_steps_no_host_holds_much_more_than_its_share() -> None:
    """All experts of a layer change their hosts: at once that takes twice the memory, in steps 10% more."""
    sizes, hosts = sizes_of(20, 40), hosts_of(*range(4))
    limits = replace(constraints_on(sizes, hosts), extra_copies=0.5)
    before, after = (plan(sizes, limits, zipf(20, 40, 1.2, seed)) for seed in (1, 2))
    share = max(sum(pair[2] == host for pair in pairs(placement)) * 10 for placement in (before, after) for host in range(4))
    assert max(peak_bytes(sizes, [before, after]).values()) > 1.3 * share
    assert max(peak_bytes(sizes, [before, *steps(sizes, before, after, share // 10)]).values()) <= 1.1 * share


def test_a_host_without_room_gives_away_before_it_gets() -> None:
    """Two hosts exchange what they have, each with room for one expert more."""
    sizes = [LayerSize("layer 0", np.full(5, 10), shared_bytes=0)]
    before, after = placed([0], [0], [1], [1], [2]), placed([1], [1], [0], [0], [2])
    assert max(peak_bytes(sizes, [before, *steps(sizes, before, after, None, Memory(30))]).values()) == 30
    assert max(peak_bytes(sizes, [before, *steps(sizes, before, after, None)]).values()) == 40
    assert steps(sizes, before, after, None, Memory(20))[-1] is after, "where there is no room at all, the caller has to see that"


def test_a_host_keeps_its_last_expert_until_another_comes() -> None:
    """Experts go round, one in a step: host 0 has given its only one away, and waits for that of host 2."""
    before, after = placed([0], [1], [2], [3]), placed([1], [2], [0], [1])
    made = steps([LayerSize("layer 0", np.full(4, 10))], before, after, 10)
    assert [each.hosts for each in made] == [(0, 1, 2, 3)] * 3 + [(0, 1, 2)]


def test_where_no_way_leads_on_the_rest_comes_at_once() -> None:
    """Each host is full and hands its only expert to the next. The caller sees that there is no room, and has not to wait for it."""
    sizes, one, ring = [LayerSize("layer 0", np.full(9, 10))], np.ones(9, dtype=np.int64), range(9)
    before, after = placed(*([host] for host in ring)), placed(*([(host + 1) % 9] for host in ring))
    assert steps(sizes, before, after, None, Memory(10, [one])) == [after]
    assert [read_bytes(sizes, each) for each in pairwise([before, *steps(sizes, before, after, 40, Memory(10, [one]))])] == [40, 40, 10]


def test_a_shared_expert_comes_with_the_first_expert_of_its_layer_and_leaves_with_the_last() -> None:
    """Host 1 gives its expert of a layer away, and with it the shared one, before it has room for those of another layer."""
    sizes = [LayerSize("layer 0", np.full(2, 10), shared_bytes=20), LayerSize("layer 1", np.full(2, 10), shared_bytes=20)]
    before, after = (
        Placement(1, 3, tuple(LayerPlacement.of(3, np.arange(2), np.array(hosts)) for hosts in layers))
        for layers in (([0, 1], [0, 0]), ([0, 2], [0, 1]))
    )
    made = steps(sizes, before, after, None, Memory(60))
    assert (len(made), peak_bytes(sizes, [before, *made])[1]) == (1, 60)
    made = steps(sizes, before, after, None, Memory(59))
    assert (len(made), peak_bytes(sizes, [before, *made])[1]) == (2, 30)


def test_copies_that_only_leave_make_room() -> None:
    sizes = [LayerSize("layer 0", np.full(3, 10))]
    before, after = placed([0, 1], [1], [2]), placed([0], [1], [1])
    made = steps(sizes, before, after, None, Memory(20))
    assert [pairs(each) for each in made] == [pairs(placed([0], [1], [2])), pairs(after)]
    assert max(peak_bytes(sizes, [before, *made]).values()) == 20


def test_full_hosts_exchange_experts_by_giving_up_a_copy_that_another_host_has_too() -> None:
    """Expert 0 goes from host 0 to host 1, and expert 2 back: host 0 begins, because expert 0 lives on host 2 meanwhile."""
    sizes, one = [LayerSize("layer 0", np.full(4, 10))], np.ones(4, dtype=np.int64)
    before, after = placed([0, 2], [0], [1], [1]), placed([1, 2], [0], [0], [1])
    made = steps(sizes, before, after, None, Memory(20, [one]))
    assert [pairs(each) for each in made] == [pairs(placed([2], [0], [1], [1])), pairs(placed([2], [0], [0], [1])), pairs(after)]
    assert (max(peak_bytes(sizes, [before, *made]).values()), read_bytes(sizes, [before, *made])) == (20, 20)
    made = steps(sizes, before, after, None, Memory(20, [2 * one]))
    assert max(peak_bytes(sizes, [before, *made]).values()) == 30, "both copies are wanted: the caller has to see that there is no room"


def test_full_hosts_exchange_experts_by_giving_up_a_copy_for_a_while() -> None:
    """Experts 0 and 1 live nowhere else, so expert 2 makes room on one of their hosts, and comes back."""
    sizes, one = [LayerSize("layer 0", np.full(3, 10))], np.ones(3, dtype=np.int64)
    before, after = placed([0], [1], [0, 1]), placed([1], [0], [0, 1])
    made = steps(sizes, before, after, None, Memory(20, [one]))
    assert made[-1] is after
    assert (max(peak_bytes(sizes, [before, *made]).values()), read_bytes(sizes, [before, *made])) == (20, 30)
    assert transition(sizes, before, after).moved_bytes == 20


@given(case=cases(is_bounded=False), seed=st.integers(0, 2**32), limit=st.none() | st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_on_full_hosts_every_expert_keeps_the_copies_that_it_must_have(case: Case, seed: int, limit: int | None) -> None:
    drawn = np.random.default_rng(seed)
    before = plan(case.sizes, case.constraints, case.demand)
    after = plan(case.sizes, case.constraints, [rows_of(drawn, len(copies)) for copies in case.constraints.least_copies], before)
    least = [np.repeat(copies, case.constraints.tensor_parallel) for copies in case.constraints.least_copies]
    most = max(max(transition(case.sizes, each, each).peak_bytes.values()) for each in (before, after))
    made, last = steps(case.sizes, before, after, limit, Memory(most, least)), before
    for placement in made:
        held = Counter(pair[:2] for pair in pairs(placement))
        assert all(held[number, unit] >= copies for number, each in enumerate(least) for unit, copies in enumerate(each.tolist()))
        for host in set(last.hosts) - set(placement.hosts):
            there, will = ({pair[:2] for pair in pairs(each) if pair[2] == host} for each in (last, after))
            free, layers = most - transition(case.sizes, last, last).peak_bytes[host], {number for number, _ in there}
            needed = [case.sizes[n].unit_bytes[unit] + (n not in layers) * case.sizes[n].shared_bytes for n, unit in will]
            assert min(needed) > free, "it has given all away because there was no room beside it"
        last = placement
    assert not made or pairs(made[-1]) == pairs(after)
