"""What a change of the number of hosts would move, as the controller of a running service would plan it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeserve.cli.columns import bytes_text
from moeserve.control import Assignment, Planner, State
from moeserve.control.changes import moved
from moeserve.control.room import bytes_meanwhile, require_room
from moeserve.errors import number_of
from moeserve.placement import Transition, transition
from moeserve.release import Release


def planned_change(planner: Planner, before: int, after: int) -> Transition:
    """From `before` hosts, where the experts are as a new service places them, to `after`.

    Raises ConfigError, also where the service would refuse the change because hosts have no room meanwhile.
    """
    sources = planner.layers.sources
    release = Release.first(planner.plan(before), sources)
    first = State(release, tuple(Assignment(number, "") for number in range(before)), before, release.epoch, before)
    # Of too many hosts, those with the highest numbers leave.
    then = moved(first, tuple(Assignment(number, "") for number in range(after)), after, planner)
    require_room(first, then, planner)
    change = transition(planner.sizes(sources), first.release.placement, then.release.placement)
    return replace(change, peak_bytes=bytes_meanwhile(first, then, planner))


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
