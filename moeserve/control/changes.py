"""From the state in force to the next one, which `Rollout.bring_in` brings into force. They read files: call them in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moeserve.checkpoints import Swap
from moeserve.config import MAX_HOSTS, Copies, most_copies
from moeserve.control.assignments import Assignment
from moeserve.control.desired import Planner
from moeserve.control.state import NumHosts, State
from moeserve.errors import ConfigError
from moeserve.placement import LayerSize, Placement, Transition, transition


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
    if next_number > MAX_HOSTS:  # frontends and the next controller take no larger ones
        raise ConfigError(f"there is no number for a further host: a service has {MAX_HOSTS}, and each is one host forever; deploy it anew")
    placement = planner.with_copies(before.copies).moved(assignments, sources, before.release.placement)
    return replace(placed(before, placement), assignments=assignments, num_hosts=num_hosts, next_number=next_number)


def placed(before: State, placement: Placement) -> State:
    """The same weights in these places, on the same hosts."""
    epoch = before.last_epoch + 1
    return replace(before, release=replace(before.release, placement=replace(placement, epoch=epoch)), last_epoch=epoch)


def arrived(before: State, after: State) -> State:
    """`after`, which was made of an earlier state of the same weights, as the one that follows `before`."""
    state = placed(before, after.release.placement)
    return replace(state, assignments=after.assignments, num_hosts=after.num_hosts, next_number=after.next_number, copies=after.copies)


def with_copies(before: State, copies: Copies, planner: Planner) -> State:
    """So many copies, as placement.copies says it, from now on; nothing else moves.

    Raises ConfigError when they do not fit, or CheckpointChanged when the weights cannot be read any more.
    """
    if most_copies(copies) > 1 and any(spec.deterministic for spec in planner.layers.specs):
        raise ConfigError("model.deterministic is true; allowed: 1 copy, because load decides which copy computes")
    sources = before.release.sources(planner.layers)
    placement = planner.with_copies(copies).moved(before.assignments, sources, before.release.placement)
    if placement is before.release.placement:
        return replace(before, copies=copies)
    for source in sources:
        source.check()
    return replace(placed(before, placement), copies=copies)


def cost_of(before: State, after: State, planner: Planner) -> Transition | None:
    """What bringing in `after` moves; None = nothing. Raises CheckpointChanged when the weights cannot be read any more."""
    if after.release is before.release:
        return None
    sizes = planner.sizes(after.release.sources(planner.layers))
    cost = transition(sizes, before.release.placement, after.release.placement)
    return replace(cost, moved_bytes=cost.moved_bytes + _swapped_bytes(before, after, sizes))


def _swapped_bytes(before: State, after: State, sizes: Sequence[LayerSize]) -> int:
    """What hosts read of new weights for the places that there were before."""
    nbytes = 0
    for size, layer in zip(sizes, after.release.placement.layers, strict=True):
        newer = [swap for swap in after.release.swaps if swap.layer == size.name and swap.revision > before.release.revision(size.name)]
        is_whole = any(swap.experts is None for swap in newer)
        experts = {expert for swap in newer for expert in swap.experts or ()}
        units = layer.unit_of_physical
        nbytes += int(size.unit_bytes[units[np.isin(units // layer.tensor_parallel, list(experts)) | is_whole]].sum())
        nbytes += is_whole * size.shared_bytes * len(np.unique(layer.host_of_physical))
    return nbytes


def told(before: State, after: State) -> Iterator[str]:
    """What has changed, in sentences."""
    epoch = after.release.epoch
    for swap in after.release.swaps:
        if swap.revision > before.release.revision(swap.layer):
            yield f"epoch {epoch}: layer {swap.layer} has revision {swap.revision}, from {swap.checkpoint}"
    if after.assignments != before.assignments:
        yield f"epoch {epoch}: experts are on hosts {', '.join(str(assignment.number) for assignment in after.assignments)}"
