"""One layer on hosts with a fixed number of places each, all of which are filled: as engines place experts on GPUs.

E experts, R replicas = places, G hosts.
"""

from __future__ import annotations

import numpy as np

from moeserve.errors import ConfigError
from moeserve.placement.constraints import Floats, HostLimits, LayerSize
from moeserve.placement.draft import LayerDraft
from moeserve.placement.exchange import improve
from moeserve.placement.layer import Integers
from moeserve.placement.replicas import grown
from moeserve.placement.room import Room
from moeserve.placement.task import LayerTask


def fill_slots(rows: Floats, slots: Integers) -> Integers:
    """The expert in each of the R places, host by host; rows [E], slots [G] with at least E places in all.

    The copies of an expert are on different hosts, unless the busiest host is less loaded otherwise.
    """
    num_replicas = int(slots.sum())
    least = np.ones(len(rows), dtype=np.int64)
    any_host = grown(rows, least, np.full(len(rows), num_replicas), num_replicas)
    replicas = np.repeat(np.arange(len(rows)), any_host)
    together = _packed((rows / any_host)[replicas], np.ones(num_replicas, dtype=np.int64), slots)
    assert together is not None, "single replicas fit anywhere"
    apart = _packed(rows, grown(rows, least, np.full(len(rows), len(slots)), num_replicas), slots)
    if apart is not None and apart.load.max() <= together.load.max():
        return _by_host(apart)
    return replicas[_by_host(together)]


def deal_evenly(rows: Floats, num_hosts: int) -> Integers:
    """[E]: the host of each, as many on one as on another: the largest first, to the least loaded."""
    draft = _filled(rows, np.ones(len(rows), dtype=np.int64), np.full(num_hosts, len(rows) // num_hosts))
    return np.array([hosts[0] for hosts in draft.places])


def _packed(rows: Floats, copies: Integers, slots: Integers) -> LayerDraft | None:
    """None if copies do not fill the places, or cannot be kept apart."""
    if copies.sum() < slots.sum():
        return None
    try:
        draft = _filled(rows, copies, slots)
    except ConfigError:
        return None
    improve(draft)
    return draft


def _filled(rows: Floats, copies: Integers, slots: Integers) -> LayerDraft:
    size = LayerSize("", np.zeros(len(rows), dtype=np.int64))
    task = LayerTask(0, size, 1, copies, copies, int(copies.sum()), slots, rows, None, None)
    draft = task.draft(Room([HostLimits(number) for number in range(len(slots))]))
    task.fill(draft, copies)
    return draft


def _by_host(draft: LayerDraft) -> Integers:
    units, hosts = draft.physical()
    return units[hosts.argsort(kind="stable")]
