"""From the state in force to the next one, which `Rollout.bring_in` brings into force. They read files: call them in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moeserve.checkpoints import Swap
from moeserve.control.assignments import Assignment
from moeserve.control.desired import Planner
from moeserve.control.state import NumHosts, State


def swapped(before: State, swaps: Sequence[Swap], planner: Planner) -> State:
    """New weights in the same places. Raises UnknownLayer, ConfigError or CheckpointError."""
    release = before.release.swapped(swaps, planner.layers, before.last_epoch + 1)
    return replace(before, release=release, last_epoch=release.epoch)


def moved(before: State, assignments: tuple[Assignment, ...], num_hosts: NumHosts, planner: Planner) -> State:
    """The same weights on these hosts; `num_hosts` is the desired number.

    Raises ConfigError when they do not fit, or CheckpointChanged when the weights cannot be read any more.
    """
    if assignments == before.assignments:
        return replace(before, num_hosts=num_hosts)
    sources = before.release.sources(planner.layers)
    for source in sources:
        source.check()  # before any host starts
    epoch, next_number = before.last_epoch + 1, max(before.next_number, assignments[-1].number + 1)
    placement = planner.moved(assignments, sources, before.release.placement, epoch)
    return State(replace(before.release, placement=placement), assignments, num_hosts, epoch, next_number)


def told(before: State, after: State) -> Iterator[str]:
    """What has changed, in sentences."""
    epoch = after.release.epoch
    for swap in after.release.swaps:
        if swap.revision > before.release.revision(swap.layer):
            yield f"epoch {epoch}: layer {swap.layer} has revision {swap.revision}, from {swap.checkpoint}"
    if after.assignments != before.assignments:
        yield f"epoch {epoch}: experts are on hosts {', '.join(str(assignment.number) for assignment in after.assignments)}"
