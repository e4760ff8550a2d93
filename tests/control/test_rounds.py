"""Rounds of balancing on hosts with little memory, without hosts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import load_config
from moeserve.checkpoints import host_bytes
from moeserve.control import Assignment, Planner, State
from moeserve.control.changes import placed, with_copies
from moeserve.control.copies import changed_copies
from moeserve.control.desired import Rows
from moeserve.control.room import bytes_meanwhile, require_room
from moeserve.control.rounds import Round, RoundStopped, planned_round, stepped
from moeserve.placement import balancedness, step_bytes, steps, transition
from moeserve.release import Release
from tests.support.planning import planner_of

LAYER = {"hidden_size": 8, "intermediate_size": 4, "seed": 0}
ONE = 3 * 8 * 4 * 4


def planner(layers: list[int], hosts: int, room: float, shared: int = 0, extra_copies: float = 0.5) -> Planner:
    """`room`: of hosts, as a multiple of the most that any holds at first."""
    more = {"shared_expert": {"intermediate_size": shared}} if shared else {}
    config = {"layers": [{**LAYER, **more, "num_experts": number} for number in layers], "placement": {"num_hosts": hosts}}
    plain = planner_of(load_config(config))
    config["placement"]["memory_per_host_bytes"] = int(room * max(host_bytes(plain.layers.sources, plain.plan(hosts))))
    return planner_of(load_config({**config, "balancing": {"extra_copies": extra_copies, "max_moved_bytes": 10 * ONE}}))


def first(planner: Planner, hosts: int) -> State:
    placement = planner.plan(hosts)
    return State(
        Release.first(placement, planner.layers.sources), tuple(Assignment(number, "") for number in range(hosts)), hosts, 1, hosts
    )


def made(state: State, planned: Round, planner: Planner) -> State:
    """After all steps, for each of which there is room."""
    for placement in planned.steps:
        following = placed(state, placement)
        require_room(state, following, planner)
        state = following
    return state


@given(
    layers=st.lists(st.integers(5, 16), min_size=1, max_size=3),
    hosts=st.integers(2, 5),
    room=st.sampled_from([1.0, 1.1, 1.3, 1.6]),
    shared=st.sampled_from([0, 8]),
    extra_copies=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_every_step_of_a_round_has_room_and_rounds_come_to_an_end(
    layers: list[int], hosts: int, room: float, shared: int, extra_copies: float, seed: int
) -> None:
    plan, drawn = planner(layers, hosts, room, shared, extra_copies), np.random.default_rng(seed)
    state = first(plan, hosts)
    for _ in range(2):
        demand: Rows = [1000 * drawn.permutation(np.arange(1, number + 1) ** -1.2) for number in layers]
        for _ in range(10):
            planned = planned_round(state, demand, plan)
            if not planned.steps:
                break
            before, state = state, made(state, planned, plan)
            assert balancedness(state.release.placement, demand) > balancedness(before.release.placement, demand)
        assert not planned.steps


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("shared", [0, 8])
def test_a_round_counts_what_hosts_hold_in_each_step_as_the_change_that_makes_it(gpus: int, shared: int) -> None:
    plan = planner([16, 5], 4, 1.25, shared)
    plan = replace(plan, placing=plan.placing.model_copy(update={"gpus_per_host": gpus}))
    state, drawn = first(plan, 4), np.random.default_rng(gpus)
    sizes, is_changed = plan.sizes(plan.layers.sources), False
    for _ in range(2):
        before = state.release.placement
        demand: Rows = [1000 * drawn.permutation(np.arange(1, number + 1) ** -1.2) for number in (16, 5)]
        made = steps(sizes, before, plan.moved(state.assignments, plan.layers.sources, before, demand), 4 * ONE)
        for nbytes, placement in zip(step_bytes(sizes, [before, *made], in_stacks=gpus > 0), made, strict=True):
            following = placed(state, placement)
            assert bytes_meanwhile(state, following, plan) == {host: nbytes[host] for host in placement.hosts}
            state, is_changed = following, True
    assert is_changed


def test_two_hosts_that_are_full_exchange_nothing_and_a_round_says_why() -> None:
    """A round that would need more room is no failure; it goes as far as there is room, here nowhere."""
    plan = planner([4], 2, 1.0, extra_copies=0.0)
    state, demand = first(plan, 2), [np.array([9.0, 9.0, 1.0, 1.0])]
    planned = planned_round(state, demand, plan)
    assert (planned.steps, planned.cost.moves, planned.is_cut) == ([], 0, True)
    assert planned.before == planned.after
    assert "placement.memory_per_host_bytes has no room for more moves" in str(planned)


def test_of_a_round_that_does_not_fit_what_fits_is_made() -> None:
    """One host has room for one expert more, and few experts have a second copy that could make room."""
    plan = planner([9], 5, 1.1, shared=8)
    state, demand = first(plan, 5), [1000 * np.random.default_rng(90).permutation(np.arange(1, 10) ** -1.2)]
    planned = planned_round(state, demand, plan)
    assert planned.is_cut and planned.cost.new == 1
    after = made(state, planned, plan)
    assert balancedness(after.release.placement, demand) == planned.after[0] > 1.5 * balancedness(state.release.placement, demand)
    assert not planned_round(after, demand, plan).steps


@pytest.mark.parametrize("seed", range(4))
def test_full_hosts_are_balanced_as_if_they_had_room_and_what_comes_back_is_counted(seed: int) -> None:
    """Each host has room for one expert more: after the first round it is full, and the second load asks for other experts."""
    plan, drawn = planner([16], 4, 1.25), np.random.default_rng(seed)
    state, has_returned = first(plan, 4), []
    for _ in range(2):
        demand = [1000 * drawn.permutation(np.arange(1, 17) ** -1.2)]
        wanted = plan.moved(state.assignments, state.release.sources(plan.layers), state.release.placement, demand)
        planned = planned_round(state, demand, plan)
        assert not planned.is_cut
        assert planned.after[0] == pytest.approx(balancedness(wanted, demand))
        in_one_step = transition(planned.sizes, state.release.placement, wanted)
        has_returned.append(planned.cost.moved_bytes > in_one_step.moved_bytes)
        assert planned.cost.moved_bytes == planned.cost_of(len(planned.steps)).moved_bytes
        state = made(state, planned, plan)
    assert np.bincount(state.release.placement.layers[0].host_of_physical).tolist() == [5, 5, 5, 5]
    assert any(has_returned) is (seed < 2)


def test_a_round_stops_when_other_copies_are_wanted_meanwhile_even_if_these_are_there_already() -> None:
    plan = planner([8], 4, 2.0)
    state = first(plan, 4)
    state = made(state, planned_round(state, [np.array([90.0, *[1.0] * 7])], plan), plan)
    planned = planned_round(state, [np.array([*[1.0] * 7, 90.0])], plan)
    had, left = (int(each.layers[0].num_copies[0]) for each in (state.release.placement, planned.steps[-1]))
    assert had > left == 1, "the round would take copies away"
    copies = changed_copies(plan, plan.layers.specs[0].name, 0, had)
    asked = with_copies(state, copies, plan)
    assert asked.release is state.release
    assert stepped(state, planned.release, planned.copies, planned.steps[0]).release is not state.release
    with pytest.raises(RoundStopped, match="another change has been made meanwhile"):
        stepped(asked, planned.release, planned.copies, planned.steps[0])
