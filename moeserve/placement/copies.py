"""Which copy of an expert computes which pairs: pure, from routing and load to physical experts.

N pairs, U units, C copies at most, D hosts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeserve.config import CopyChoice
from moeserve.placement.layer import Booleans, Integers, LayerPlacement

# A second copy reads the expert's weights once more, which does not pay for fewer pairs.
_MIN_SHARE = 64


def choose_copies(units: Integers, placement: LayerPlacement, is_live: Booleans, load: Integers, choice: CopyChoice) -> Integers:
    """The physical expert of every pair.

    units   [N]  which unit each pair needs
    is_live [D]  false = the host is down: its copies are taken only where no other lives
    load    [D]  rows each host has been sent and not yet answered

    round_robin deals the pairs of a unit out to its copies in turn. least_outstanding evens out the hosts' outstanding work, splitting the
    pairs of a unit only where there are many.
    """
    if placement.copies.shape[1] == 1:
        only: Integers = placement.first_physical[units]
        return only
    table, counts = _usable(placement, is_live)
    physical: Integers = table[units, 0]
    busy, pairs = np.unique(units, return_counts=True)
    shared_out = counts[busy] > 1
    if not shared_out.any():
        return physical
    order = units.argsort(kind="stable")
    first = pairs.cumsum() - pairs
    if choice == "round_robin":
        rank = np.arange(len(units)) - np.repeat(first, pairs)
        physical[order] = table[units[order], rank % counts[units[order]]]
        return physical
    load = load + np.bincount(placement.host_of_physical[physical[counts[units] == 1]], minlength=placement.num_hosts)
    for index in np.flatnonzero(shared_out)[np.argsort(-pairs[shared_out], kind="stable")].tolist():
        number, start = int(pairs[index]), int(first[index])
        copies = table[busy[index], : counts[busy[index]]]
        hosts = placement.host_of_physical[copies]
        shares = _level(load[hosts], number)
        load[hosts] += shares
        physical[order[start : start + number]] = np.repeat(copies, shares)
    return physical


def _usable(placement: LayerPlacement, is_live: Booleans) -> tuple[Integers, Integers]:
    """The usable copies of each unit, [U, C] with those first, and their number [U]: live ones, or all if none is live."""
    table = placement.copies
    exists = table >= 0
    usable = exists & is_live[placement.host_of_physical[table]]
    usable = np.where(usable.any(axis=1, keepdims=True), usable, exists)
    order = (~usable).argsort(axis=1, kind="stable")
    return np.take_along_axis(table, order, axis=1), usable.sum(axis=1)


def _level(load: npt.NDArray[np.integer], pairs: int) -> Integers:
    """[C]: `pairs` divided so that the loads become as even as possible (water filling), in shares of a minimum size."""
    shares = np.zeros(len(load), dtype=np.int64)
    order = load.argsort(kind="stable")
    for used in range(min(len(order), max(1, pairs // _MIN_SHARE)), 0, -1):
        chosen = order[:used]
        level = (int(load[chosen].sum()) + pairs) / used
        fair = np.floor(level - load[chosen]).astype(np.int64)
        if used == 1 or fair.min() >= _MIN_SHARE:
            fair[0] += pairs - fair.sum()
            shares[chosen] = fair
            break
    return shares
