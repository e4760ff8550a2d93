"""What a change of the number of hosts would move, as the controller of a running service would plan it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from moeserve.cli.columns import bytes_text
from moeserve.control import Assignment, Planner, State
from moeserve.control.changes import moved, placed
from moeserve.control.room import bytes_meanwhile, require_room
from moeserve.control.thinning import placements_between
from moeserve.errors import number_of
from moeserve.placement import Transition, read_bytes, transition
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
    states = [first]
    for placement in placements_between(first, then, planner, ()):
        states.append(placed(states[-1], placement))
    if len(states) == 1:
        require_room(first, then, planner)
    peak: dict[int, int] = {}
    for before_step, after_step in pairwise([*states, then]):
        for host, nbytes in bytes_meanwhile(before_step, after_step, planner).items():
            peak[host] = max(nbytes, peak.get(host, 0))
    sizes, placements = planner.sizes(sources), [each.release.placement for each in (*states, then)]
    change = transition(sizes, placements[0], placements[-1])
    return replace(change, moved_bytes=read_bytes(sizes, placements), peak_bytes=dict(sorted(peak.items())))


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
