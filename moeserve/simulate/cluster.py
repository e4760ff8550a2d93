"""Imagined hosts on imagined nodes, with the experts of a service placed on them as its controller would."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from moeserve.checkpoints import ServedLayers, layer_sources
from moeserve.config import ServedModel, ServiceConfig
from moeserve.control import Assignment, Planner, State
from moeserve.control.changes import moved
from moeserve.errors import ConfigError
from moeserve.release import Release

#: a round is planned in one step: what hosts read at once is not what is asked
_NO_BOUND_BYTES = 2**60


@dataclass(frozen=True, eq=False)
class SimulatedCluster:
    """Hosts that serve what `planner` places; `state` is in force. `num_nodes`: None = each host is on a node of its own."""

    planner: Planner
    state: State
    num_nodes: int | None = None

    @classmethod
    def of(cls, config: ServiceConfig, num_hosts: int, num_nodes: int | None = None) -> SimulatedCluster:
        """As a new service places its experts. Raises ConfigError when they do not fit, or CheckpointError; reads no weights."""
        if num_nodes is not None and not 1 <= num_nodes <= num_hosts:
            raise ConfigError(f"--nodes is {num_nodes}; allowed: 1 to the number of hosts, {num_hosts}")
        model = config.only(ServedModel)
        placing = config.placement.model_copy(update={"num_hosts": num_hosts})
        balancing = config.balancing.model_copy(update={"max_moved_bytes": _NO_BOUND_BYTES})
        planner = Planner(ServedLayers(model, layer_sources(model)), placing, False, balancing)
        release = Release.first(planner.plan(num_hosts), planner.layers.sources)
        # Nodes take hosts in turn. Without nodes nothing is to be spread, and unknown ones are all alike.
        assignments = tuple(Assignment(host, "" if num_nodes is None else f"node-{host % num_nodes}") for host in range(num_hosts))
        return cls(planner, State(release, assignments, num_hosts, release.epoch, num_hosts), num_nodes)

    @property
    def nodes(self) -> dict[int, str]:
        """The node of each host, by its number; hosts without nodes have one each."""
        return {each.number: each.node or f"node-{each.number}" for each in self.state.assignments}

    def without(self, lost: Collection[int]) -> SimulatedCluster:
        """Without these hosts, their experts on the others. Raises ConfigError when they do not fit there."""
        return self._on(tuple(each for each in self.state.assignments if each.number not in lost))

    def resized(self, num_hosts: int) -> SimulatedCluster:
        """With so many hosts: the newest leave, or new ones join, each on a node of its own. Raises ConfigError when experts do not fit."""
        assert self.num_nodes is None, "nodes that are shared do not grow"
        stay, first = self.state.assignments[:num_hosts], self.state.next_number
        return self._on((*stay, *(Assignment(first + number, "") for number in range(num_hosts - len(stay)))))

    def _on(self, assignments: tuple[Assignment, ...]) -> SimulatedCluster:
        return replace(self, state=moved(self.state, assignments, len(assignments), self.planner))
