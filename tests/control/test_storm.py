"""A real controller in a storm of events: nodes and hosts come, go and fail, administrators change things, and the load turns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moeserve import ConfigError, ExpertUnavailable, load_config
from moeserve.control import State
from moeserve.control.controller import Controller
from moeserve.control.first_state import first_state
from moeserve.control.frontends import Frontends
from moeserve.errors import MoEServeError
from moeserve.observe.audit import AuditEvent
from moeserve.placement import Placement
from tests.support.planning import planner_of
from tests.support.simulated import SimulatedFrontend, SimulatedHosts, SimulatedNodes

Result = TypeVar("Result")
NUM_EXPERTS = (12, 7)
ONE = 3 * 8 * 4 * 4
LIMIT = 12 * ONE
LAYERS = [{"hidden_size": 8, "intermediate_size": 4, "num_experts": number, "seed": 0} for number in NUM_EXPERTS]
CONFIG = {
    "layers": LAYERS,
    "placement": {"num_hosts": 3, "memory_per_host_bytes": LIMIT},
    "balancing": {"extra_copies": 0.5, "max_moved_bytes": 4 * ONE},
}
PLANNER = planner_of(load_config(CONFIG))


class Storm(RuleBasedStateMachine):
    """Every rule is an event; the controller follows what has happened, as it does every half second."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.nodes, self.hosts = SimulatedNodes({"a": 3, "b": 3}), SimulatedHosts()
        self.saved: list[State] = []
        self.run(self._start())

    async def _start(self) -> None:
        async def admit(keys: frozenset[str]) -> None:
            pass

        state = await first_state(PLANNER, self.nodes)
        frontends = Frontends("storm", load_config(CONFIG), 1.0, admit)
        self.frontend = SimulatedFrontend(frontends, NUM_EXPERTS)
        await self.hosts.take(state.release, state.assignments)
        frontends.begin(state.release)
        self.controller = Controller(PLANNER, state, self.nodes, self.hosts, frontends, self.saved.append)
        await self.frontend.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.frontend.stop())
        self.loop.close()

    def tried(self, work: Coroutine[Any, Any, object]) -> None:
        """What cannot be is refused, and changes nothing."""
        before = self.controller.state
        try:
            self.run(work)
        except (ConfigError, ExpertUnavailable):
            assert self.controller.state.release is before.release
            assert self.controller.state.num_hosts == before.num_hosts

    def follow(self) -> None:
        try:
            self.run(self.controller.follow())
        except MoEServeError as error:
            assert "the disk is full" in str(error)

    @rule(number=st.integers(1, 8))
    def scales(self, number: int) -> None:
        self.tried(self.controller.scale(number))

    @rule(data=st.data())
    def drains(self, data: st.DataObject) -> None:
        assignment = data.draw(st.sampled_from(self.controller.state.assignments))
        self.tried(self.controller.drain(f"host-{assignment.number}"))

    @rule(layer=st.sampled_from(["", "layers.0", "layers.1"]), expert=st.none() | st.integers(0, 11), copies=st.integers(1, 3))
    def copies_are_set(self, layer: str, expert: int | None, copies: int) -> None:
        self.tried(self.controller.scale_copies(layer, expert, copies))

    @rule(layer=st.integers(0, 1), seed=st.integers(0, 99), skew=st.sampled_from([0.0, 1.2, 3.0]))
    def load_turns(self, layer: int, seed: int, skew: float) -> None:
        share = np.random.default_rng(seed).permutation(np.arange(1, NUM_EXPERTS[layer] + 1) ** -skew)
        self.run(self.controller.rebalance(dry_run=True))
        self.frontend.asked(layer, (1e6 * share).astype(np.int64))

    @rule()
    def is_balanced(self) -> None:
        down, is_full = bool(self.controller.down), self.hosts.refuses
        try:
            done = self.run(self.controller.rebalance())
        except (ConfigError, ExpertUnavailable) as error:
            assert down or is_full or "while this change happens" in str(error), "hosts may be too full to exchange experts"
            return
        assert not down
        assert done.balancedness >= done.balancedness_before - 1e-9
        assert self.run(self.controller.rebalance()).steps == 0, "the same load moves nothing twice"

    @rule(name=st.sampled_from("abcd"), cpus=st.integers(1, 4))
    def a_node_joins(self, name: str, cpus: int) -> None:
        self.nodes.cpus.setdefault(name, cpus)
        self.follow()

    @rule(data=st.data(), dies=st.booleans())
    def a_node_goes(self, data: st.DataObject, dies: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.nodes.cpus)))
        if dies and len(self.nodes.cpus) > 1:
            del self.nodes.cpus[name]
            self.hosts.down |= {each.number for each in self.controller.state.assignments if each.node == name}
        else:
            self.nodes.leaving ^= {name}
        self.follow()

    @rule(data=st.data())
    def a_host_dies_or_is_back(self, data: st.DataObject) -> None:
        assignment = data.draw(st.sampled_from(self.controller.state.assignments))
        if assignment.node in self.nodes.cpus:
            self.hosts.down ^= {assignment.number}
        self.follow()

    @rule()
    def a_disk_is_full(self) -> None:
        """The next change fails."""
        self.hosts.refuses = True

    @invariant()
    def every_expert_is_where_it_should_be(self) -> None:
        state = self.controller.state
        placement = state.release.placement
        numbers = {assignment.number for assignment in state.assignments}
        assert set(placement.hosts) <= numbers
        for layer, number in zip(placement.layers, NUM_EXPERTS, strict=True):
            pairs = list(zip(layer.unit_of_physical.tolist(), layer.host_of_physical.tolist(), strict=True))
            assert len(set(pairs)) == len(pairs), "two copies of an expert on one host"
            assert {unit for unit, _ in pairs} == set(range(number)), "an expert is nowhere"
        assert max(held_bytes(placement).values()) <= LIMIT

    @invariant()
    def hosts_have_what_is_served_and_nothing_else(self) -> None:
        state = self.controller.state
        assert set(self.hosts.held) == {assignment.number for assignment in state.assignments}
        assert all(held == {state.release.epoch: state.release} for held in self.hosts.held.values())

    @invariant()
    def epochs_only_grow(self) -> None:
        assert self.frontend.epochs == sorted(set(self.frontend.epochs))
        assert self.controller.state.last_epoch >= self.controller.state.release.epoch >= self.frontend.epochs[-1]
        assert [state.last_epoch for state in self.saved] == sorted(state.last_epoch for state in self.saved)
        assert [state.next_number for state in self.saved] == sorted(state.next_number for state in self.saved)

    @invariant()
    def nothing_changes_without_a_record(self) -> None:
        epochs = [event.epoch for event in self.run(self._recorded())]
        assert epochs == sorted(epochs) and (epochs or [1])[-1] == self.controller.state.release.epoch

    async def _recorded(self) -> list[AuditEvent]:
        return [event async for event in self.controller.audit.events()]

    @invariant()
    def what_is_left_alone_stays(self) -> None:
        self.follow()
        self.follow()
        before = self.controller.state
        self.follow()
        assert self.controller.state.release is before.release and self.controller.state.assignments == before.assignments


def held_bytes(placement: Placement) -> dict[int, int]:
    counts = sum(np.bincount(layer.host_of_physical, minlength=placement.num_hosts) for layer in placement.layers)
    return dict(enumerate((ONE * np.asarray(counts)).tolist()))


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
