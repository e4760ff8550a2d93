"""Changes that go wrong on their way: what stays of them, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moeserve import ConfigError, ExpertUnavailable, load_config
from moeserve.config import ServiceConfig
from moeserve.control import Assignment, State
from moeserve.control.controller import Controller
from moeserve.control.first_state import first_state
from moeserve.control.frontends import Frontends
from moeserve.observe.audit import AuditEvent
from moeserve.release import Release
from tests.support.planning import planner_of
from tests.support.simulated import SimulatedFrontend, SimulatedHosts, SimulatedNodes

NUM_EXPERTS = 16
LAYER = "layers.0"


def configuration(room: int) -> ServiceConfig:
    """3 hosts with room for so many experts each."""
    return load_config(
        {
            "layers": [{"hidden_size": 8, "intermediate_size": 4, "num_experts": NUM_EXPERTS, "seed": 0}],
            "placement": {"num_hosts": 3, "memory_per_host_bytes": room * 3 * 8 * 4 * 4},
            "balancing": {"extra_copies": 0.5},
        }
    )


CONFIG = configuration(9)


class FullHosts(SimulatedHosts):
    """`refuses_at`: the epoch that cannot be loaded."""

    refuses_at = 0

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        self.refuses = release.epoch == self.refuses_at
        await super().take(release, assignments)


async def started(
    hosts: SimulatedHosts, save: Callable[[State], None] = lambda _: None, config: ServiceConfig = CONFIG
) -> tuple[Controller, SimulatedFrontend]:
    async def admit(keys: frozenset[str]) -> None:
        pass

    nodes, planner = SimulatedNodes({"a": 8}), planner_of(config)
    state, frontends = await first_state(planner, nodes), Frontends("id", config, 1.0, admit)
    frontends.begin(state.release)
    controller = Controller(planner, state, nodes, hosts, frontends, save)
    await controller.begin(hosts.take(state.release, state.assignments), "the service starts")
    frontend = SimulatedFrontend(frontends, [NUM_EXPERTS])
    await frontend.start()
    return controller, frontend


async def recorded(controller: Controller) -> list[AuditEvent]:
    return [event async for event in controller.audit.events()]


async def test_a_later_step_of_a_change_fails_and_what_has_moved_stays_and_is_said() -> None:
    hosts = FullHosts()
    controller, frontend = await started(hosts)
    await controller.rebalance(dry_run=True)
    frontend.asked(0, (1e6 * np.arange(1, NUM_EXPERTS + 1) ** -1.2).astype(np.int64))
    await controller.rebalance()
    full = controller.state
    hosts.refuses_at = full.last_epoch + 2
    sentence = r"^step 2 of \d+ cannot be made, and what has moved until then stays: the disk is full$"
    with pytest.raises(ExpertUnavailable, match=sentence):
        await controller.scale(2)
    state = controller.state
    assert (state.release.epoch, state.assignments, state.num_hosts) == (full.release.epoch + 1, full.assignments, 3)
    assert all(held == {state.release.epoch: state.release} for held in hosts.held.values())
    *_, stopped = await recorded(controller)
    assert (stopped.kind, stopped.outcome, stopped.epoch) == ("scale", "stopped", state.release.epoch)
    await controller.scale(2)
    assert len(controller.state.assignments) == 2, "it can be asked for again"
    await frontend.stop()


async def test_full_hosts_give_copies_away_for_those_that_are_asked_for() -> None:
    """24 copies on 3 hosts with room for 8 each: a second copy of an expert takes the place of one that balancing has made."""
    hosts = FullHosts()
    controller, frontend = await started(hosts, config=configuration(8))
    await controller.rebalance(dry_run=True)
    frontend.asked(0, (1e6 * np.arange(1, NUM_EXPERTS + 1) ** -0.3).astype(np.int64))
    await controller.rebalance()
    copies = controller.state.release.placement.layers[0].num_copies
    assert copies.sum() == 24 and copies[NUM_EXPERTS - 1] == 1
    await controller.scale_copies(LAYER, NUM_EXPERTS - 1, 2)
    layer = controller.state.release.placement.layers[0]
    assert (layer.num_copies[NUM_EXPERTS - 1], np.bincount(layer.host_of_physical).tolist()) == (2, [8, 8, 8])
    assert controller.state.copies == {"default": 1, LAYER: {"default": 1, str(NUM_EXPERTS - 1): 2}}
    assert controller.state.release.epoch > 2 and (await recorded(controller))[-1].outcome == "done"
    await frontend.stop()


async def test_new_hosts_end_when_neither_a_change_nor_its_withdrawal_can_be_saved() -> None:
    hosts, is_away = SimulatedHosts(), False

    def save(state: State) -> None:
        if is_away and len(hosts.held) > 3:
            raise ConnectionError("the store is away")

    controller, frontend = await started(hosts, save)
    is_away, before = True, controller.state
    with pytest.raises(ConnectionError, match="the store is away"):
        await controller.scale(4)
    assert controller.state.release is before.release
    assert hosts.held == {number: {1: before.release} for number in range(3)}
    is_away = False
    await controller.scale(4)
    assert set(hosts.held) == {0, 1, 2, 4}, "the number of the host that has ended is not given out again"
    await frontend.stop()


async def test_what_cannot_begin_is_the_error_of_its_first_step() -> None:
    hosts = FullHosts()
    controller, frontend = await started(hosts)
    hosts.refuses_at, before = 2, controller.state
    with pytest.raises(ConfigError, match=r"^the disk is full$"):
        await controller.scale(2)
    assert controller.state.release is before.release
    await frontend.stop()
