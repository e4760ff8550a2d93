"""What a change of the number of hosts would move, as the controller of a running service would plan it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeserve.checkpoints import in_memory, layer_size
from moeserve.cli.columns import bytes_text
from moeserve.control import Assignment, Planner
from moeserve.errors import number_of
from moeserve.placement import Transition, transition


def planned_change(planner: Planner, before: int, after: int) -> Transition:
    """From `before` hosts, where the experts are as a new service places them, to `after`. Raises ConfigError."""
    sources = planner.layers.sources
    first = planner.plan(before)
    # Of too many hosts, those with the highest numbers leave.
    then = planner.moved([Assignment(number, "") for number in range(after)], sources, first)
    change = transition([layer_size(source, planner.placing.tensor_parallel) for source in sources], first, then)
    peak = in_memory([*change.peak_bytes.values()], sources, planner.placing, planner.layers.model.store)
    return replace(change, peak_bytes=dict(zip(change.peak_bytes, peak, strict=True)))


def as_json(change: Transition) -> dict[str, Any]:
    """peak_bytes_per_host: of every host before or after, by its number."""
    return {
        "moves": change.moves,
        "new": change.new,
        "kept": change.kept,
        "moved_bytes": change.moved_bytes,
        "peak_bytes_per_host": [nbytes for _, nbytes in sorted(change.peak_bytes.items())],
    }


def as_text(change: Transition, before: int, after: int) -> str:
    """Two sentences."""
    more = f", {change.new} further copies are made" if change.new else ""
    return (
        f"From {number_of(before, 'host')} to {after}: {change.moves} experts move{more}, {change.kept} stay. "
        f"{bytes_text(change.moved_bytes)} are read, and no host holds more than {bytes_text(max(change.peak_bytes.values()))} meanwhile."
    )
