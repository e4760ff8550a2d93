"""A round of balancing: what would move, what that costs, and what it gains. It reads files: plan it in a thread."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeserve.config import Copies
from moeserve.control.changes import placed
from moeserve.control.desired import Planner, Rows
from moeserve.control.room import steps_with_room
from moeserve.control.state import State
from moeserve.errors import ExpertUnavailable, number_of
from moeserve.placement import (
    LayerSize,
    Placement,
    Transition,
    balancedness,
    layer_balancedness,
    mean_balancedness,
    read_bytes,
    steps,
    transition,
)
from moeserve.release import Release


class RoundStopped(ExpertUnavailable):
    """A round goes no further: a host is down, calls have become slower, or another change has been made."""


@dataclass(frozen=True, eq=False)
class Round:
    """From `release` in `steps` to the balanced placement, or as far towards it as hosts have room meanwhile; no steps = nothing moves.

    copies: as the state has them that it was planned for
    cost: of all steps; before, after: balancedness of the hosts for each layer, None = nobody asks for it
    is_cut: hosts have no room for the rest
    """

    release: Release
    copies: Copies | None
    sizes: list[LayerSize]
    steps: list[Placement]
    cost: Transition
    before: list[float | None]
    after: list[float | None]
    is_cut: bool = False

    def cost_of(self, done: int) -> Transition:
        """Of the first `done` steps."""
        if done == len(self.steps):
            return self.cost
        return _cost(self.sizes, [self.release.placement, *self.steps[:done]])

    @property
    def gain(self) -> str:
        """What it is for, in words."""
        gain = f"balancedness of the hosts {mean_balancedness(self.before):.3f} -> {mean_balancedness(self.after):.3f}"
        return f"{gain}; placement.memory_per_host_bytes has no room for more moves" if self.is_cut else gain

    def __str__(self) -> str:
        cost = self.cost
        moves = f"{number_of(cost.moves, 'move')} and {number_of(cost.new, 'further copy')}"
        return f"{moves}, {cost.moved_bytes} bytes in {number_of(len(self.steps), 'step')}; {self.gain}"


def planned_round(state: State, demand: Rows, planner: Planner) -> Round:
    """The round that `demand`, rows [E] of each layer, asks for. The same demand after it asks for nothing more.

    Raises ConfigError when experts do not fit, or CheckpointChanged when the weights cannot be read any more.
    """
    planner, before = planner.with_copies(state.copies), state.release.placement
    sources = state.release.sources(planner.layers)
    after = planner.moved(state.assignments, sources, before, demand)
    if after is not before:
        for source in sources:
            source.check()  # before any host reads it
    sizes, stages = planner.sizes(sources), planner.placing.pipeline_stages
    wanted = steps(sizes, before, after, planner.balancing.max_moved_bytes, planner.memory(state.assignments))
    made = _with_room(wanted, before, sizes, demand, planner)
    after = made[-1] if made else before
    return Round(
        state.release,
        state.copies,
        sizes,
        made,
        _cost(sizes, [before, *made]),
        layer_balancedness(before, demand, stages),
        layer_balancedness(after, demand, stages),
        is_cut=len(made) < len(wanted),
    )


def _cost(sizes: list[LayerSize], placements: list[Placement]) -> Transition:
    return replace(transition(sizes, placements[0], placements[-1]), moved_bytes=read_bytes(sizes, placements))


def _with_room(wanted: list[Placement], before: Placement, sizes: list[LayerSize], demand: Rows, planner: Planner) -> list[Placement]:
    """The first of the steps, as many as hosts have room for; if not all, no further than to the best balanced one, if that is worth it."""
    placements = [before, *wanted]
    done = len(wanted) if planner.limit_bytes is None else steps_with_room(sizes, placements, planner)
    if done == len(wanted):
        return wanted
    even = [balancedness(each, demand, planner.placing.pipeline_stages) for each in placements[: done + 1]]
    return wanted[: even.index(max(even))] if max(even) >= (1 + planner.balancing.min_gain) * even[0] else []


def stepped(before: State, served: Release, copies: Copies | None, placement: Placement) -> State:
    """One step of a round, from `served`. Raises RoundStopped when something else is served, or other `copies` are wanted, meanwhile."""
    if before.release is not served or before.copies != copies:
        raise RoundStopped("a round of balancing goes no further, because another change has been made meanwhile")
    return placed(before, placement)
