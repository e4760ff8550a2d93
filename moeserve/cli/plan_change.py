"""What a change of the number of hosts would move, as the controller of a running service would plan it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeserve.checkpoints import LayerSource, layer_size
from moeserve.cli.columns import bytes_text
from moeserve.config import PlacementConfig
from moeserve.placement import HostLimits, Transition, constraints_of, plan, plan_placement, transition


def planned_change(sources: Sequence[LayerSource], placing: PlacementConfig, before: int, after: int) -> Transition:
    """From `before` hosts, where the experts are as a new service places them, to `after`. Raises ConfigError."""
    specs, free = [source.spec for source in sources], placing.model_copy(update={"experts_per_host": None})
    sizes = [layer_size(source, placing.tensor_parallel) for source in sources]
    hosts = [HostLimits(number, placing.memory_per_host_bytes) for number in range(after)]
    first = plan_placement(specs, free.model_copy(update={"num_hosts": before}))
    return transition(sizes, first, plan(sizes, constraints_of(specs, free, hosts), previous=first))


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
    """A few sentences."""
    more = f", {change.new} further copies are made" if change.new else ""
    return (
        f"From {before} hosts to {after}: {change.moves} experts move{more}, {change.kept} stay. "
        f"{bytes_text(change.moved_bytes)} are read, and no host "
        f"holds more than {bytes_text(max(change.peak_bytes.values()))} meanwhile."
    )
