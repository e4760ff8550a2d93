"""The desired state by [placement], and the smallest and largest number of hosts that can serve the experts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moeserve.checkpoints import LayerSource, ServedLayers, check_memory, host_bytes, in_memory, layer_size, memory_bytes
from moeserve.config import AutoscalingConfig, BalancingConfig, Copies, PlacementConfig
from moeserve.control.assignments import Assignment, Wanted
from moeserve.control.autoscale import Bounds
from moeserve.control.state import NumHosts
from moeserve.errors import ConfigError, number_of
from moeserve.placement import (
    Constraints,
    HostLimits,
    LayerSize,
    Memory,
    Placement,
    constraints_of,
    fewest_hosts,
    most_hosts,
    plan,
    plan_placement,
)

Rows: TypeAlias = Sequence[npt.NDArray[np.float64] | None]


@dataclass(frozen=True, eq=False)
class Planner:
    """Places the experts of `layers` as `placing` and `balancing` say, on as many hosts as `autoscaling` allows.

    `on_this_machine`: hosts without a GPU share its memory.
    """

    layers: ServedLayers
    placing: PlacementConfig
    on_this_machine: bool
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)

    def with_copies(self, copies: Copies | None) -> Planner:
        """With these in place of placement.copies; None = the same planner."""
        return self if copies is None else replace(self, placing=self.placing.model_copy(update={"copies": copies}))

    def plan(self, num_hosts: int) -> Placement:
        """The first placement, on `num_hosts` hosts. Raises ConfigError when it is impossible, or does not fit the memory."""
        placement = self._on(num_hosts)
        self._check_memory(host_bytes(self.layers.sources, placement))
        return placement

    def moved(
        self, assignments: Sequence[Assignment], sources: Sequence[LayerSource], previous: Placement, demand: Rows | None = None
    ) -> Placement:
        """The placement on these hosts that moves as few experts of `previous` as it can; itself, if none. Raises as `plan`.

        `sources`: the layers with their current weights; `demand`: rows [E] of each, to be balanced.
        """
        constraints = self._constraints(assignments)
        if demand is None:  # what nobody asks for is moved because it must be, not for what it gains
            constraints = replace(constraints, min_gain=1.0)
        placement = plan(self.sizes(sources), constraints, demand, previous)
        self._check_memory(host_bytes(sources, placement))
        return placement

    def sizes(self, sources: Sequence[LayerSource]) -> list[LayerSize]:
        """What hosts hold of each layer, in bytes."""
        return [layer_size(source, self.placing.tensor_parallel) for source in sources]

    def _constraints(self, assignments: Sequence[Assignment]) -> Constraints:
        limit, balancing = self.limit_bytes, self.balancing
        hosts = [HostLimits(assignment.number, limit, assignment.node) for assignment in assignments]
        # With fewer hosts, as after the loss of one, an expert has as many copies as can be.
        min_copies = min(balancing.min_copies, self._most_copies(len(hosts)))
        constraints = constraints_of(self.layers.specs, _free_number(self.placing), hosts, min_copies)
        return replace(constraints, extra_copies=balancing.extra_copies, min_gain=balancing.min_gain)

    def first_num_hosts(self) -> NumHosts:
        """placement.num_hosts, or the number that placement.experts_per_host needs. Raises ConfigError when it is impossible."""
        if self.placing.num_hosts == "all":
            return "all"
        placement = plan_placement(self.layers.specs, self.placing)
        self._check_memory(host_bytes(self.layers.sources, placement))
        if not self.autoscaling.enabled and self.balancing.min_copies > (most := self._most_copies(placement.num_hosts)):
            raise ConfigError(
                f"balancing.min_copies is {self.balancing.min_copies} with {number_of(placement.num_hosts, 'host')}; "
                f"allowed: at most {most}, each copy on a host of its own"
            )
        return placement.num_hosts

    def _most_copies(self, num_hosts: int) -> int:
        return max(1, num_hosts // self.placing.pipeline_stages)

    def wanted(self, num_hosts: NumHosts) -> Wanted:
        """The desired state with `num_hosts` hosts. Raises ConfigError when that number, or any number, cannot hold the experts."""
        if num_hosts != "all":
            self.plan(num_hosts)
        return self._wanted(num_hosts, must_fit=True)

    def kept(self, num_hosts: NumHosts) -> Wanted:
        """The desired state with the number of hosts that is in force, even if the experts fit only as they are placed now."""
        return self._wanted(num_hosts, must_fit=False)

    def _wanted(self, num_hosts: NumHosts, must_fit: bool) -> Wanted:
        placing, specs = self.placing, self.layers.specs
        fewest = fewest_hosts(specs, placing)
        if num_hosts == "all":  # the search takes seconds for the largest models, and only "all" needs it
            upper = most = most_hosts(specs, placing)
            if fewest > most:
                self._on(fewest)  # raises the reason
                raise ConfigError(
                    f"placement needs {number_of(fewest, 'host')}, and some of them would hold no expert; allowed: at most {most}"
                )
        else:
            upper, most = max(fewest, num_hosts), None
        return Wanted(
            num_hosts=num_hosts,
            cpus=placing.cpus_per_host,
            gpus=placing.gpus_per_host,
            labels=placing.node_labels,
            strategy=placing.node_strategy,
            least=self._least(fewest, upper, must_fit),
            most=most,
        )

    def bounds(self) -> Bounds:
        """The numbers of hosts that autoscaling may choose from. Raises ConfigError when there is none."""
        config, wanted = self.autoscaling, self.wanted("all")
        assert wanted.most is not None, "as it is of all"
        least, most = max(config.min_hosts, wanted.least), min(config.max_hosts or wanted.most, wanted.most)
        if least > most:
            raise ConfigError(
                f"autoscaling.min_hosts is {config.min_hosts} and autoscaling.max_hosts {config.max_hosts or 'unset'}, but "
                f"the experts need at least {number_of(wanted.least, 'host')}, and at most {wanted.most} can hold one each"
            )
        return Bounds(least, most)

    def _on(self, num_hosts: int) -> Placement:
        return plan_placement(self.layers.specs, _free_number(self.placing).model_copy(update={"num_hosts": num_hosts}))

    @property
    def limit_bytes(self) -> int | None:
        """What the experts of a host must fit into; None = anything, because there is no limit, or because they spill."""
        return None if self.layers.model.store.spill is not None else self.placing.memory_per_host_bytes

    def memory(self, assignments: Sequence[Assignment]) -> Memory | None:
        """Of these hosts, while experts move from one to another; None = enough."""
        if self.limit_bytes is None:
            return None
        least = self._constraints(assignments).least_copies
        return Memory(self.limit_bytes, [np.repeat(copies, self.placing.tensor_parallel) for copies in least])

    def _check_memory(self, nbytes: Sequence[int]) -> None:
        needed = in_memory(nbytes, self.layers.sources, self.placing, self.layers.model.store)
        check_memory(needed, self.placing, memory_bytes() if self.on_this_machine else None)

    def _least(self, fewest: int, most: int, must_fit: bool) -> int:
        """The smallest number of hosts that each have room for their weights when they are dealt out; `most` if even that is too small."""
        limit = self.limit_bytes
        if limit is None:
            return fewest
        largest = self._largest(most)
        if largest > limit:
            if must_fit:
                self._check_memory([largest])
            return most
        numbers = range(fewest, most + 1)
        return numbers[bisect_left(numbers, True, key=lambda number: self._largest(number) <= limit)]

    def _largest(self, num_hosts: int) -> int:
        """Bytes of the host with the most weights."""
        return max(host_bytes(self.layers.sources, self._on(num_hosts)))


def _free_number(placing: PlacementConfig) -> PlacementConfig:
    """placement.experts_per_host decides with how many hosts a service starts; administrators and nodes decide after that."""
    return placing.model_copy(update={"experts_per_host": None})
