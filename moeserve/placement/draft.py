"""One layer of a placement while it is made.

E experts, M shards each, U units, P physical experts, D hosts of the layer's stage, called 0..D-1.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from moeserve.placement.constraints import Floats, LayerSize
from moeserve.placement.layer import Booleans, Integers
from moeserve.placement.room import Room


class LayerDraft:
    """Which hosts hold each unit, how loaded they are by it, and which may take more.

    places: U lists of hosts
    count [D], load [D]: physical experts of this layer, and the rows expected for them
    weight [U]: rows expected for each copy of a unit
    quota [D]: how many each would hold if all held as many, one more where there is the least of other layers
    """

    def __init__(self, room: Room, size: LayerSize, shards: int, most_held: int | Integers) -> None:
        self.room, self.size, self.shards = room, size, shards
        self.most_held = np.broadcast_to(np.asarray(most_held), len(room))
        self.places: list[list[int]] = [[] for _ in range(len(size.unit_bytes))]
        self.count = np.zeros(len(room), dtype=np.int64)
        self.weigh(None, np.ones(len(self.places) // shards, dtype=np.int64))

    def copy(self) -> LayerDraft:
        """Another one of the same room."""
        other = LayerDraft.__new__(LayerDraft)
        other.__dict__.update(self.__dict__)
        other.places, other.count, other.load = [[*hosts] for hosts in self.places], self.count.copy(), self.load.copy()
        return other

    def weigh(self, rows: Floats | None, copies: Integers) -> None:
        """Loads from here on are those of `copies` copies, which share the rows [E] of their expert; None = every copy counts as one."""
        self.weight = np.ones(len(self.places)) if rows is None else np.repeat(rows / np.maximum(copies, 1), self.shards)
        units, hosts = self.physical()
        # Of nothing, bincount makes integers.
        self.load = np.bincount(hosts, weights=self.weight[units], minlength=len(self.room)).astype(np.float64)
        even, more = divmod(int(copies.sum()) * self.shards, len(self.room))
        self.quota = np.full(len(self.room), even)
        elsewhere = self.room.used - np.bincount(hosts, weights=self.size.unit_bytes[units], minlength=len(self.room)).astype(np.int64)
        self.quota[elsewhere.argsort(kind="stable")[:more]] += 1

    @property
    def mean(self) -> float:
        """Load of a host, if all had the same."""
        return float(self.load.mean())

    def physical(self) -> tuple[Integers, Integers]:
        """Unit and host of every physical expert: [P] each, by unit."""
        number = [len(hosts) for hosts in self.places]
        hosts = np.fromiter(chain.from_iterable(self.places), dtype=np.int64, count=sum(number))
        return np.repeat(np.arange(len(self.places)), number), hosts

    def complete(self) -> Integers:
        """[E]: copies of which every shard is placed."""
        fewest: Integers = np.array([len(hosts) for hosts in self.places]).reshape(-1, self.shards).min(axis=1)
        return fewest

    def hosts_of(self, unit: int) -> list[int]:
        """Those that hold any shard of the unit's expert."""
        if self.shards == 1:
            return self.places[unit]
        first = unit // self.shards * self.shards
        return [*chain.from_iterable(self.places[first : first + self.shards])]

    def hold(self, units: Integers, hosts: Integers) -> None:
        """These physical experts, as the first ones. Loads count after `weigh`."""
        by_unit = hosts[units.argsort(kind="stable")]
        ends = np.bincount(units, minlength=len(self.places)).cumsum()
        self.places = [each.tolist() for each in np.split(by_unit, ends[:-1])]
        self.count = np.bincount(hosts, minlength=len(self.room))
        nbytes = np.bincount(hosts, weights=self.size.unit_bytes[units], minlength=len(self.room)).astype(np.int64)
        self.room.used += nbytes + np.where(self.count, self.size.shared_bytes, 0)
        self.room.held += self.count

    def add(self, unit: int, host: int) -> None:
        """One more physical expert."""
        self.room.used[host] += self.size.unit_bytes[unit] + (0 if self.count[host] else self.size.shared_bytes)
        self.room.held[host] += 1
        self.places[unit].append(host)
        self.count[host] += 1
        self.load[host] += self.weight[unit]

    def remove(self, unit: int, host: int) -> None:
        """One less."""
        self.places[unit].remove(host)
        self.count[host] -= 1
        self.load[host] -= self.weight[unit]
        self.room.used[host] -= self.size.unit_bytes[unit] + (0 if self.count[host] else self.size.shared_bytes)
        self.room.held[host] -= 1

    def move(self, unit: int, source: int, target: int) -> None:
        """From one host to another."""
        self.remove(unit, source)
        self.add(unit, target)

    def has_room(self, unit: int) -> Booleans:
        """[D]: the hosts with room for one more physical expert, for the bytes of this one."""
        has_room: Booleans = self.count < self.most_held
        if self.room.is_bounded:
            needed = self.size.unit_bytes[unit] + np.where(self.count, 0, self.size.shared_bytes)
            has_room &= self.room.used + needed <= self.room.memory
        return has_room

    def may_take(self, unit: int, most_shards: int) -> Booleans:
        """[D]: the hosts with room for the unit that neither hold it nor so many shards of its expert, which are of as many copies."""
        free = self.has_room(unit)
        free[self.places[unit]] = False
        return free & (self._shards(unit) < most_shards) if self.shards > 1 else free

    def choose(self, unit: int, number: int, most_shards: int, by_room: bool = False) -> list[int]:
        """The hosts for so many more copies of a unit, or for as many as there is room for.

        Of those that may take it the ones with the fewest shards of its expert; on the nodes with the fewest copies; among these the least
        loaded, or those with the most memory left.
        """
        free = self.may_take(unit, most_shards)
        if self.shards > 1:
            free = _fewest(free, self._shards(unit))
        hosts = np.flatnonzero(free)
        if not len(hosts):
            return []
        first = (self.room.used - self.room.memory if by_room else self.load)[hosts]
        is_full = np.zeros(len(hosts), dtype=bool) if by_room else self.count[hosts] >= self.quota[hosts]
        # The first and hottest go where fewer will follow.
        order = np.lexsort((self.room.used[hosts], self.quota[hosts], first, is_full))
        if self.room.num_nodes > 1:
            order = order[self._levels(unit, hosts[order]).argsort(kind="stable")]
        chosen: list[int] = hosts[order[:number]].tolist()
        return chosen

    def _shards(self, unit: int) -> Integers:
        """[D]: how many shards of the unit's expert each host holds."""
        return np.bincount(np.array(self.hosts_of(unit), dtype=np.int64), minlength=len(self.room))

    def _levels(self, unit: int, hosts: Integers) -> Integers:
        """How many copies the node of each of these would have, if they were taken in this order."""
        nodes = self.room.nodes[hosts]
        by_node = nodes.argsort(kind="stable")
        first = np.searchsorted(nodes[by_node], np.arange(self.room.num_nodes))
        rank = np.empty(len(hosts), dtype=np.int64)
        rank[by_node] = np.arange(len(hosts)) - first[nodes[by_node]]
        return rank + self.on_nodes(unit)[nodes]

    def least_loaded(self, hosts: Integers) -> int:
        """Of these hosts; where several are, the one with the fewest bytes of all layers."""
        load = self.load[hosts]
        ties = hosts[load == load.min()]
        return int(ties[self.room.used[ties].argmin()])

    def on_nodes(self, unit: int) -> Integers:
        """Copies of the unit on each node."""
        return np.bincount(self.room.nodes[self.places[unit]], minlength=self.room.num_nodes)

    def may_move(self, unit: int, source: int, target: int) -> bool:
        """Whether it keeps copies and shards apart: on hosts, and on nodes as well as now."""
        if target in self.hosts_of(unit):
            return False
        if self.room.num_nodes == 1 or len(self.places[unit]) == 1:
            return True
        copies, (left, entered) = self.on_nodes(unit), self.room.nodes[[source, target]]
        return bool(left == entered or copies[entered] < copies[left])


def _fewest(free: Booleans, key: Integers) -> Booleans:
    """Of the free hosts those with the least key."""
    return free & (key == key[free].min()) if free.any() else free
