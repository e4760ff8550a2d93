"""Hosts that are gone for good, beside hosts that are full of copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moeserve import ExpertUnavailable, load_config
from moeserve.control import Assignment
from moeserve.control.controller import Controller
from moeserve.control.first_state import first_state
from moeserve.control.frontends import Frontends
from moeserve.observe.stats import host_name
from moeserve.placement import Placement
from moeserve.release import Release
from tests.support.planning import planner_of
from tests.support.simulated import SimulatedFrontend, SimulatedHosts, SimulatedNodes

NUM_EXPERTS = 16
MOST = 9
CONFIG = load_config(
    {
        "layers": [{"hidden_size": 8, "intermediate_size": 4, "num_experts": NUM_EXPERTS, "seed": 0}],
        "placement": {"num_hosts": 3, "memory_per_host_bytes": MOST * 3 * 8 * 4 * 4},
        "balancing": {"extra_copies": 0.5},
    }
)


class FullHosts(SimulatedHosts):
    """Those that are given up cannot be told anything, and nobody holds more experts than it may."""

    def __init__(self) -> None:
        super().__init__()
        self.placements: list[Placement] = []

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            if assignment.number in self.given_up:
                raise ExpertUnavailable(f"{host_name(assignment.number)} is gone for good")
        await super().take(release, assignments)
        for number in self.present:
            assert len({expert for each in self.held[number].values() for expert in experts_on(each.placement, number)}) <= MOST
        self.placements.append(release.placement)

    def lose(self, number: int) -> None:
        self.down.add(number)
        self.given_up = {*self.given_up, number}


def experts_on(placement: Placement, number: int) -> set[int]:
    return {shard.expert for shard in placement.layers[0].shards_on(number)}


def live_experts(placement: Placement, hosts: SimulatedHosts) -> set[int]:
    return set().union(*(experts_on(placement, number) for number in hosts.present))


async def started(nodes: SimulatedNodes, hosts: SimulatedHosts) -> tuple[Controller, SimulatedFrontend]:
    async def admit(keys: frozenset[str]) -> None:
        pass

    planner = planner_of(CONFIG)
    state, frontends = await first_state(planner, nodes), Frontends("id", CONFIG, 1.0, admit)
    frontends.begin(state.release)
    controller = Controller(planner, state, nodes, hosts, frontends, lambda _: None)
    await controller.begin(hosts.take(state.release, state.assignments), "the service starts")
    frontend = SimulatedFrontend(frontends, [NUM_EXPERTS])
    await frontend.start()
    await controller.rebalance(dry_run=True)
    frontend.asked(0, (1e6 * np.arange(1, NUM_EXPERTS + 1) ** -1.2).astype(np.int64))
    await controller.rebalance()
    return controller, frontend


@pytest.mark.parametrize("lost", range(3))
async def test_experts_of_a_host_that_is_gone_get_room_from_copies_of_others(lost: int) -> None:
    nodes, hosts = SimulatedNodes({"a": 1, "b": 1, "c": 1}), FullHosts()
    controller, frontend = await started(nodes, hosts)
    full = controller.state.release.placement
    assert full.layers[0].num_copies.sum() == 1.5 * NUM_EXPERTS
    hosts.lose(lost)
    nodes.cpus = {node: 1 for node, number in zip("abc", range(3), strict=True) if number != lost}
    left = live_experts(full, hosts)
    assert len(left) < NUM_EXPERTS, "some had their only copy there"
    await controller.follow()
    state = controller.state
    assert [assignment.number for assignment in state.assignments] == [number for number in range(3) if number != lost] == [*hosts.held]
    assert live_experts(state.release.placement, hosts) == set(range(NUM_EXPERTS))
    assert all(held == {state.release.epoch: state.release} for held in hosts.held.values())
    assert all(left <= live_experts(placement, hosts) for placement in hosts.placements[-2:]), "none loses its last copy meanwhile"
    await controller.follow()
    assert controller.state.release is state.release
    *_, event = [event async for event in controller.audit.events()]
    assert (event.kind, event.outcome, event.epoch) == ("hosts", "done", state.release.epoch)
    await frontend.stop()
