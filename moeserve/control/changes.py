"""From the state in force to the next one, which `Rollout.bring_in` brings into force. They read files: call them in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moeserve.checkpoints import Swap
from moeserve.config import Copies
from moeserve.control.assignments import Assignment
from moeserve.control.desired import Planner
from moeserve.control.state import NumHosts, State
from moeserve.errors import ConfigError
from moeserve.placement import Placement


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
    next_number = max(before.next_number, assignments[-1].number + 1)
    placement = planner.with_copies(before.copies).moved(assignments, sources, before.release.placement)
    return replace(placed(before, placement), assignments=assignments, num_hosts=num_hosts, next_number=next_number)


def placed(before: State, placement: Placement) -> State:
    """The same weights in these places, on the same hosts."""
    epoch = before.last_epoch + 1
    return replace(before, release=replace(before.release, placement=replace(placement, epoch=epoch)), last_epoch=epoch)


def with_copies(before: State, copies: Copies, planner: Planner) -> State:
    """So many copies, as placement.copies says it, from now on; nothing else moves.

    Raises ConfigError when they do not fit, or CheckpointChanged when the weights cannot be read any more.
    """
    if copies != 1 and any(spec.deterministic for spec in planner.layers.specs):
        raise ConfigError("model.deterministic is true; allowed: 1 copy, because load decides which copy computes")
    sources = before.release.sources(planner.layers)
    placement = planner.with_copies(copies).moved(before.assignments, sources, before.release.placement)
    if placement is before.release.placement:
        return replace(before, copies=copies)
    for source in sources:
        source.check()
    return replace(placed(before, placement), copies=copies)


def told(before: State, after: State) -> Iterator[str]:
    """What has changed, in sentences."""
    epoch = after.release.epoch
    for swap in after.release.swaps:
        if swap.revision > before.release.revision(swap.layer):
            yield f"epoch {epoch}: layer {swap.layer} has revision {swap.revision}, from {swap.checkpoint}"
    if after.assignments != before.assignments:
        yield f"epoch {epoch}: experts are on hosts {', '.join(str(assignment.number) for assignment in after.assignments)}"
