"""One layer's part in making a plan: what is given, and the drafts that come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeserve.errors import ConfigError, number_of
from moeserve.placement.constraints import Floats, LayerSize
from moeserve.placement.draft import LayerDraft
from moeserve.placement.exchange import improve
from moeserve.placement.layer import Integers
from moeserve.placement.matching import matched
from moeserve.placement.replicas import grown, shifted, trimmed
from moeserve.placement.room import Room


@dataclass(frozen=True, eq=False)
class LayerTask:
    """What is given of a layer: E experts, M = shards.

    number: of the layer
    least [E], most [E]: copies; budget: most physical experts; most_held: those that a host may hold, or [D]
    rows [E]: load of each expert; None = not known
    placed: units and hosts of what is on hosts that stay; None = nowhere
    before [E]: how many copies there are now on all hosts
    """

    number: int
    size: LayerSize
    shards: int
    least: Integers
    most: Integers
    budget: int
    most_held: int | Integers
    rows: Floats | None
    placed: tuple[Integers, Integers] | None
    before: Integers | None

    def draft(self, room: Room) -> LayerDraft:
        """An empty one."""
        return LayerDraft(room, self.size, self.shards, self.most_held)

    def copies(self) -> Integers:
        """[E], to begin with: as many as before within the bounds; if nothing was before, as many as the load wants."""
        if self.before is None:
            return self.least if self.rows is None else grown(self.rows, self.least, self.most, self.budget)
        rows = np.ones(len(self.least)) if self.rows is None else self.rows
        return trimmed(rows, np.clip(self.before, self.least, self.most), self.least, self.budget)

    def keep(self, draft: LayerDraft) -> None:
        """What is placed stays where it is, unless its host may not hold so much any more."""
        if self.placed is None:
            return
        draft.hold(*self.placed)
        is_over = (draft.count > draft.most_held) | (draft.room.used > draft.room.memory)
        for unit, host in np.stack(self.placed).T[is_over[self.placed[1]]].tolist():
            if draft.count[host] > draft.most_held[host] or draft.room.used[host] > draft.room.memory[host]:
                draft.remove(unit, host)

    def fill(self, draft: LayerDraft, copies: Integers, by_room: bool = False) -> None:
        """Places and removes copies until there are so many, or as many beyond `least` as there is room for.

        Raises ConfigError where there is none for `least`.
        """
        self.drop(draft, copies)
        draft.weigh(self.rows, copies)
        complete = draft.complete()
        missing = np.flatnonzero(complete < copies)
        weight = draft.size.unit_bytes[missing * self.shards] if by_room else draft.weight[missing * self.shards]
        for expert in missing[(-weight).argsort(kind="stable")].tolist():
            complete[expert] += self._add(draft, expert, int(copies[expert] - complete[expert]), by_room)
        self._check(draft)
        self.drop(draft, np.minimum(copies, complete))
        draft.weigh(self.rows, complete)

    def _add(self, draft: LayerDraft, expert: int, number: int, by_room: bool) -> int:
        """Adds so many copies of the expert, or as many as there is room for: how many."""
        if self.shards > 1:
            return next((added for added in range(number) if not self._add_shards(draft, expert, by_room)), number)
        hosts = draft.choose(expert, number, 1, by_room)
        for host in hosts:
            draft.add(expert, host)
        return len(hosts)

    def _add_shards(self, draft: LayerDraft, expert: int, by_room: bool) -> bool:
        """Adds the shards that one more copy of the expert lacks: all of them, or none."""
        units = range(expert * self.shards, (expert + 1) * self.shards)
        number = min(len(draft.places[unit]) for unit in units) + 1
        most = max(number, *(len(draft.places[unit]) for unit in units))
        missing = [unit for unit in units if len(draft.places[unit]) < number]
        for position, unit in enumerate(missing):
            hosts = draft.choose(unit, 1, most, by_room)
            if not hosts:
                for each in missing[:position]:
                    draft.remove(each, draft.places[each][-1])
                return _add_one_each(draft, missing, most)
            draft.add(unit, hosts[0])
        return True

    def rebalanced(self, draft: LayerDraft, min_gain: float) -> LayerDraft | None:
        """A draft whose busiest host has less load, by that share; None if there is none: then nothing moves."""
        if self.rows is None:
            return None
        least_gain = max(min_gain, 1e-6)
        best = grown(self.rows, self.least, self.most, self.budget)
        bound = max(draft.mean, float((self.rows / best).max()))
        peak = float(draft.load.max())
        if bound > (1 - least_gain) * peak:
            return None
        saved, other = draft.room.saved(), draft.copy()
        copies = grown(self.rows, trimmed(self.rows, draft.complete(), self.least, self.budget), self.most, self.budget)
        try:
            self.fill(other, shifted(self.rows, copies, (self.least, self.most), min_gain))
        except ConfigError:  # shards that were to be sorted anew found no room
            draft.room.restore(saved)
            return None
        improve(other, even_enough=min_gain / 2)
        if other.load.max() <= (1 - least_gain) * peak:
            return other
        draft.room.restore(saved)
        return None

    def drop(self, draft: LayerDraft, copies: Integers) -> None:
        """Removes the copies beyond `copies`: from nodes with several and from busy hosts, never the last expert of a host if avoidable.

        Of an expert in shards, from hosts with several of them: each must be of another copy. If no such choice is left, all of them go.
        """
        for unit, hosts in enumerate(draft.places):
            for _ in range(len(hosts) - int(copies[unit // self.shards])):
                on_node, near = draft.on_nodes(unit)[draft.room.nodes], Counter(draft.hosts_of(unit))
                order = [(draft.room.held[host] > 1, near[host], on_node[host], draft.load[host], host) for host in hosts]
                draft.remove(unit, max(order)[-1])
        for expert, number in enumerate(copies.tolist()) if self.shards > 1 else ():
            if max(Counter(draft.hosts_of(expert * self.shards)).values(), default=0) > number:
                for unit in range(expert * self.shards, (expert + 1) * self.shards):
                    for host in [*draft.places[unit]]:
                        draft.remove(unit, host)

    def _check(self, draft: LayerDraft) -> None:
        lacking = np.flatnonzero(draft.complete() < self.least)
        if not len(lacking):
            return
        expert = int(lacking[0])
        nbytes, full = int(draft.size.unit_bytes[expert * self.shards]), int((draft.count >= draft.most_held).sum())
        raise ConfigError(
            f"expert {expert} of layer {self.size.name} cannot be placed in {number_of(int(self.least[expert]), 'copy')}: {full} of "
            f"{number_of(len(draft.room), 'host')} hold as many experts of the layer as placement.experts_per_host allows, "
            f"and no other host without it has room for {nbytes} bytes within its memory"
        )


def _add_one_each(draft: LayerDraft, units: Sequence[int], most_shards: int) -> bool:
    """Adds each unit on a host without any of the others, if all can be: what one likes best may be the only one for another."""
    hosts = matched([np.flatnonzero(draft.may_take(unit, most_shards)).tolist() for unit in units])
    if hosts is None:
        return False
    for unit, host in zip(units, hosts, strict=True):
        draft.add(unit, host)
    return True
