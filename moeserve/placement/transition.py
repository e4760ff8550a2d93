"""From one placement to the next: what is read, and what hosts hold meanwhile. Pure.

D hosts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moeserve.placement.constraints import LayerSize
from moeserve.placement.layer import Integers, LayerPlacement, Placement


@dataclass(frozen=True, eq=False)
class Transition:
    """What a change costs. Physical experts are counted.

    moves: they leave a host and come back on another
    new: further copies
    kept: on the same host as before
    moved_bytes: read by the hosts that get moves and new copies
    peak_bytes: of each host by number, while it holds what it held and what it will hold, both at once
    """

    moves: int
    new: int
    kept: int
    moved_bytes: int
    peak_bytes: dict[int, int]


def transition(sizes: Sequence[LayerSize], before: Placement, after: Placement) -> Transition:
    """The change in one step. Placements of the same layers; a host is the same if its number is."""
    num_hosts = max(before.num_hosts, after.num_hosts)
    moves = new = kept = moved_bytes = 0
    peak = np.zeros(num_hosts, dtype=np.int64)
    for size, old, now in zip(sizes, before.layers, after.layers, strict=True):
        change = Change.of(old, now)
        num_units = len(size.unit_bytes)
        came, left = (np.bincount(units, minlength=num_units) for units, _ in (change.arrivals, change.departures))
        moves += int(np.minimum(came, left).sum())
        new += int((came - np.minimum(came, left)).sum())
        kept += len(now.unit_of_physical) - int(came.sum())
        moved_bytes += int(size.unit_bytes[change.arrivals[0]].sum())
        units = np.concatenate([old.unit_of_physical, change.arrivals[0]])
        hosts = np.concatenate([old.host_of_physical, change.arrivals[1]])
        peak += bytes_on(size, units, hosts, num_hosts)
    return Transition(moves, new, kept, moved_bytes, {host: int(peak[host]) for host in sorted({*before.hosts, *after.hosts})})


def peak_bytes(sizes: Sequence[LayerSize], placements: Sequence[Placement]) -> dict[int, int]:
    """The most bytes that each host, by number, holds while the placements come into force one after the other."""
    peak: dict[int, int] = {}
    for before, after in pairwise(placements):
        for host, nbytes in transition(sizes, before, after).peak_bytes.items():
            peak[host] = max(nbytes, peak.get(host, 0))
    return peak


def read_bytes(sizes: Sequence[LayerSize], placements: Sequence[Placement]) -> int:
    """What hosts read while the placements come into force one after the other. If copies come back, it is more than in one step."""
    return sum(
        int(size.unit_bytes[Change.of(old, now).arrivals[0]].sum())
        for before, after in pairwise(placements)
        for size, old, now in zip(sizes, before.layers, after.layers, strict=True)
        if old is not now
    )


def step_bytes(sizes: Sequence[LayerSize], placements: Sequence[Placement], *, in_stacks: bool) -> Iterator[Integers]:
    """[D]: what each host holds while the second placement comes into force, then the third, and so on. Quick where few layers change.

    in_stacks: on a GPU, where layers that change are there twice, and while one is put together, what is new in it.
    """
    num_hosts = max(each.num_hosts for each in placements)
    held = np.zeros(num_hosts, dtype=np.int64)
    for size, layer in zip(sizes, placements[0].layers, strict=True):
        held += bytes_on(size, layer.unit_of_physical, layer.host_of_physical, num_hosts)
    for before, after in pairwise(placements):
        both, largest = held.copy(), np.zeros_like(held)
        for size, old, now in zip(sizes, before.layers, after.layers, strict=True):
            if old is now:
                continue
            change = Change.of(old, now)
            was, will = (bytes_on(size, each.unit_of_physical, each.host_of_physical, num_hosts) for each in (old, now))
            new = np.bincount(change.arrivals[1], weights=size.unit_bytes[change.arrivals[0]], minlength=num_hosts).astype(np.int64)
            both += new + size.shared_bytes * ((was == 0) & (will > 0))
            held += will - was
            if in_stacks:
                is_changed = np.bincount([*change.arrivals[1], *change.departures[1]], minlength=num_hosts) > 0
                kept = np.where(is_changed & (was > 0), will - new, 0)
                both += kept
                largest = np.maximum(largest, np.where(kept > 0, new, 0))
        yield both + largest


def bytes_on(size: LayerSize, units: Integers, hosts: Integers, num_hosts: int) -> Integers:
    """[D]: of these physical experts, and of the shared expert where there is any."""
    nbytes = np.bincount(hosts, weights=size.unit_bytes[units], minlength=num_hosts).astype(np.int64)
    nbytes[np.unique(hosts)] += size.shared_bytes
    return nbytes


@dataclass(frozen=True, eq=False)
class Change:
    """One layer's: pairs of units and hosts, [2, n] each, ascending. arrivals: only afterwards; departures: only before."""

    arrivals: Integers
    departures: Integers

    @classmethod
    def of(cls, before: LayerPlacement, after: LayerPlacement) -> Change:
        """From one to the other."""
        width = max(before.num_hosts, after.num_hosts)
        old, new = (layer.unit_of_physical.astype(np.int64) * width + layer.host_of_physical for layer in (before, after))
        came, left = np.setdiff1d(new, old), np.setdiff1d(old, new)
        return cls(np.array(np.divmod(came, width)), np.array(np.divmod(left, width)))
