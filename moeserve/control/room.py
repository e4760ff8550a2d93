"""Whether hosts have room for what they serve and what they get, at once."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.checkpoints import check_change, in_memory, memory_bytes
from moeserve.control.desired import Planner
from moeserve.control.state import State
from moeserve.errors import ConfigError
from moeserve.host import bytes_of_both, needed_bytes
from moeserve.placement import LayerSize, Placement, step_bytes


def require_room(before: State, after: State, planner: Planner) -> None:
    """Raises ConfigError when a host would hold more than it may while the change happens."""
    if after.release is not before.release:
        check_change(bytes_meanwhile(before, after, planner), planner.placing, memory_bytes() if planner.on_this_machine else None)


def bytes_meanwhile(before: State, after: State, planner: Planner) -> dict[int, int]:
    """What each host, by number, has in memory while the change happens."""
    old, new, placing = before.release, after.release, planner.placing
    served, coming = old.sources(planner.layers), new.sources(planner.layers)
    hosts = [*{*old.placement.hosts, *new.placement.hosts}]
    nbytes = [
        bytes_of_both(needed_bytes(old, served, host), needed_bytes(new, coming, host), in_stacks=placing.gpus_per_host > 0)
        for host in hosts
    ]
    return dict(zip(hosts, in_memory(nbytes, coming, placing, planner.layers.model.store), strict=True))


def steps_with_room(sizes: Sequence[LayerSize], placements: Sequence[Placement], planner: Planner) -> int:
    """How many of the changes from one placement to the next hosts have room for, by `require_room`: the same weights in other places."""
    placing, machine_bytes = planner.placing, memory_bytes() if planner.on_this_machine else None
    for done, nbytes in enumerate(step_bytes(sizes, placements, in_stacks=placing.gpus_per_host > 0)):
        try:
            check_change(dict(enumerate(nbytes.tolist())), placing, machine_bytes)
        except ConfigError:
            return done
    return len(placements) - 1
