"""Moves and exchanges of one layer's experts that relieve its busiest host.

I physical experts of the busiest host, J of the least loaded ones or nothing, P in all, D hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from moeserve.placement.constraints import Floats
from moeserve.placement.draft import LayerDraft
from moeserve.placement.layer import Booleans, Integers

#: what an exchange must take from the busiest host, as a share of the mean load: less is not worth reading an expert
_LEAST_GAIN: Final = 0.005
#: how many hosts take part, and how many experts of each
_HOSTS: Final = 8
_EXPERTS: Final = 32
_NOTHING: Final = -1
#: hosts whose bytes stay below so many times the mean may hold more experts of a layer than others
_SLACK: Final = 1.1


def improve(draft: LayerDraft, even_enough: float = 0.0) -> None:
    """Exchanges experts of the busiest host for less loaded ones, or moves them, until none pays, or it is that close to the mean."""
    mean = draft.mean
    units, hosts = draft.physical()
    for _ in range(4 * len(draft.room)):
        busiest = int(draft.load.argmax())
        if draft.load[busiest] <= (1 + even_enough) * mean:
            return
        offers = _Offers.of(draft, units, hosts, busiest)
        chosen = offers.best(draft, draft.load[busiest] - _LEAST_GAIN * mean)
        if chosen is None:
            return
        mine, theirs = chosen
        target = int(offers.hosts[theirs])
        other = int(offers.theirs[theirs])
        draft.move(int(units[offers.mine[mine]]), busiest, target)
        hosts[offers.mine[mine]] = target
        if other != _NOTHING:
            draft.move(int(units[other]), target, busiest)
            hosts[other] = busiest


@dataclass(frozen=True, eq=False)
class _Offers:
    """mine [I]: physical experts; theirs [J]: as many as are offered for them, _NOTHING = none; hosts [J]: by whom."""

    busiest: int
    mine: Integers
    theirs: Integers
    hosts: Integers
    mine_units: Integers
    their_units: Integers

    @classmethod
    def of(cls, draft: LayerDraft, units: Integers, hosts: Integers, busiest: int) -> _Offers:
        last = min(_HOSTS, len(draft.load)) - 1
        coolest = np.flatnonzero(draft.load <= np.partition(draft.load, last)[last])
        coolest = coolest[draft.load[coolest].argsort(kind="stable")][:_HOSTS]
        coolest = coolest[coolest != busiest]
        room = draft.room
        has_slack = room.used + draft.size.unit_bytes.max() <= _SLACK * room.used.mean()
        takes = coolest[((draft.count < draft.most_held) & ((draft.count < draft.quota) | has_slack))[coolest]]
        weight = draft.weight[units]
        mine = _sample(np.flatnonzero(hosts == busiest), weight)
        offered = [_sample(np.flatnonzero(hosts == host), weight) for host in coolest.tolist()]
        theirs: Integers = np.concatenate([np.full(len(takes), _NOTHING), *offered])
        return cls(
            busiest,
            mine,
            theirs,
            np.concatenate([takes, hosts[theirs[len(takes) :]]]),
            units[mine],
            np.where(theirs == _NOTHING, _NOTHING, units[theirs]),
        )

    def best(self, draft: LayerDraft, below: float) -> tuple[int, int] | None:
        """The indices of the exchange that leaves both hosts least loaded, if `below` that."""
        weight = np.where(self.theirs == _NOTHING, 0.0, draft.weight[self.their_units])
        taken: Floats = draft.weight[self.mine_units][:, None] - weight[None, :]
        peak = np.maximum(draft.load[self.busiest] - taken, draft.load[self.hosts][None, :] + taken)
        peak[~(self._fits(draft) & self._apart(draft))] = np.inf
        if not peak.size or not peak.min() < below:
            return None
        mine, theirs = divmod(int(peak.argmin()), peak.shape[1])
        return mine, theirs

    def _fits(self, draft: LayerDraft) -> Booleans:
        """[I, J]: both hosts have the memory."""
        room = draft.room
        if not room.is_bounded:
            return np.ones((len(self.mine), len(self.theirs)), dtype=bool)
        nbytes = np.where(self.theirs == _NOTHING, 0, draft.size.unit_bytes[self.their_units])
        more = draft.size.unit_bytes[self.mine_units][:, None] - nbytes[None, :]
        shared = np.where(draft.count[self.hosts], 0, draft.size.shared_bytes)
        there = room.used[self.hosts] + shared + more <= room.memory[self.hosts]
        here = room.used[self.busiest] - more <= room.memory[self.busiest]
        fits: Booleans = there & here
        return fits

    def _apart(self, draft: LayerDraft) -> Booleans:
        """[I, J]: neither host would hold an expert twice, nor a node copies that stood on two nodes."""
        apart = np.ones((len(self.mine), len(self.theirs)), dtype=bool)
        # The only shard of an expert with one copy is apart from others anywhere.
        for row, unit in enumerate(self.mine_units.tolist()):
            if len(draft.hosts_of(unit)) > 1:
                allowed = {host: draft.may_move(unit, self.busiest, host) for host in set(self.hosts.tolist())}
                apart[row] = [allowed[host] for host in self.hosts.tolist()]
        for column, (unit, host) in enumerate(zip(self.their_units.tolist(), self.hosts.tolist(), strict=True)):
            if unit != _NOTHING and len(draft.hosts_of(unit)) > 1 and not draft.may_move(unit, host, self.busiest):
                apart[:, column] = False
        return apart


def _sample(physical: Integers, weight: Floats) -> Integers:
    """All of them, or if they are many some of every weight."""
    if len(physical) <= _EXPERTS:
        return physical
    ordered = physical[weight[physical].argsort(kind="stable")]
    return ordered[np.linspace(0, len(ordered) - 1, _EXPERTS).astype(np.int64)]
