"""Where the experts of one layer are: logical experts (the model's) -> units -> physical experts (copies of a unit) -> hosts.

E logical experts that live on hosts, M shards each, U = E * M units (unit = expert * M + shard), P physical experts, C copies at most,
D hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeserve.experts import ExpertShard
from moeserve.kernels import Places

Integers = npt.NDArray[np.integer]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class LayerPlacement:
    """One layer's physical experts, numbered host by host; immutable. A host that has any of them has the layer's shared expert too.

    unit_of_physical [P]: which unit each is a copy of
    host_of_physical [P], ascending: the host it lives on
    tensor_parallel: M, on how many hosts each expert is spread along its intermediate dimension
    """

    num_hosts: int
    unit_of_physical: Integers
    host_of_physical: Integers
    tensor_parallel: int = 1

    @classmethod
    def of(cls, num_hosts: int, units: Integers, hosts: Integers, tensor_parallel: int = 1) -> LayerPlacement:
        """Of pairs in any order: units [P], and the host of each."""
        order = np.lexsort((units, hosts))
        return cls(num_hosts, units[order], hosts[order], tensor_parallel)

    @cached_property
    def num_units(self) -> int:
        """How many units the layer has: U."""
        return int(self.unit_of_physical.max()) + 1

    @property
    def num_experts(self) -> int:
        """E: those that live on hosts."""
        return self.num_units // self.tensor_parallel

    @property
    def logical_of_physical(self) -> Integers:
        """[P], the logical expert of each."""
        return self.unit_of_physical // self.tensor_parallel

    @cached_property
    def local_expert_of_physical(self) -> Integers:
        """[P] int32: index among the experts of its host."""
        first = np.searchsorted(self.host_of_physical, self.host_of_physical)
        return (np.arange(len(self.host_of_physical)) - first).astype(np.int32)

    @cached_property
    def first_physical(self) -> Integers:
        """[U], of the narrowest type, because NumPy sorts numbers of up to 16 bits by radix: the first copy of each unit."""
        return self.copies[:, 0].astype(np.min_scalar_type(len(self.unit_of_physical)))

    @cached_property
    def places(self) -> Places:
        """The same for compiled code."""
        return Places(self.first_physical, self.host_of_physical, self.num_hosts)

    @cached_property
    def copies(self) -> Integers:
        """[U, C]: the physical experts of each unit, -1 where there is none."""
        counts = np.bincount(self.unit_of_physical, minlength=self.num_units)
        by_unit = self.unit_of_physical.argsort(kind="stable")
        units = self.unit_of_physical[by_unit]
        rank = np.arange(len(units)) - (counts.cumsum() - counts)[units]
        table = np.full((self.num_units, counts.max()), -1)
        table[units, rank] = by_unit
        return table

    def shards_on(self, host: int) -> list[ExpertShard]:
        """The shards on `host`, by local expert; the next index after the last is the shared expert."""
        return self._shards(self.unit_of_physical[self.host_of_physical == host])

    def by_host(self) -> Iterator[tuple[int, list[ExpertShard]]]:
        """The hosts with experts of this layer, ascending, and the shards of each, as in `shards_on`."""
        hosts, first = np.unique(self.host_of_physical, return_index=True)
        for host, units in zip(hosts.tolist(), np.split(self.unit_of_physical, first[1:]), strict=True):
            yield host, self._shards(units)

    def _shards(self, units: Integers) -> list[ExpertShard]:
        return [ExpertShard(unit // self.tensor_parallel, unit % self.tensor_parallel, self.tensor_parallel) for unit in units.tolist()]

    @cached_property
    def shared_local_expert(self) -> Integers:
        """[D] int32: the local index of the shared expert, on hosts that have any of this layer."""
        return np.bincount(self.host_of_physical, minlength=self.num_hosts).astype(np.int32)

    @property
    def num_copies(self) -> Integers:
        """[E]: copies of each expert."""
        return self.live_copies(np.ones(self.num_hosts, dtype=np.bool_))

    def live_copies(self, is_live: Booleans) -> Integers:
        """[E]: complete copies of each expert, put together of the shards on live hosts; is_live [D]."""
        alive = self.unit_of_physical[is_live[self.host_of_physical]]
        shards = np.bincount(alive, minlength=self.num_units)
        fewest: Integers = shards.reshape(-1, self.tensor_parallel).min(axis=1)
        return fewest


@dataclass(frozen=True, eq=False)
class Placement:
    """All layers at one moment; a change is a new placement with a higher epoch."""

    epoch: int
    num_hosts: int
    layers: tuple[LayerPlacement, ...]

    @cached_property
    def hosts(self) -> tuple[int, ...]:
        """The numbers of the hosts with experts, ascending; below num_hosts, with gaps where hosts were removed."""
        return tuple(sorted({int(host) for layer in self.layers for host in np.unique(layer.host_of_physical)}))
