"""A round of balancing: what would move, what that costs, and what it gains. It reads files: plan it in a thread."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.control.changes import placed
from moeserve.control.desired import Planner, Rows
from moeserve.control.state import State
from moeserve.errors import ExpertUnavailable, number_of
from moeserve.placement import LayerSize, Placement, Transition, layer_balancedness, mean_balancedness, steps, transition
from moeserve.release import Release


class RoundStopped(ExpertUnavailable):
    """A round goes no further: a host is down, calls have become slower, or another change has been made."""


@dataclass(frozen=True, eq=False)
class Round:
    """From `release` in `steps` to the balanced placement; no steps = nothing moves.

    cost: of all steps; before, after: balancedness of the hosts for each layer, None = nobody asks for it
    """

    release: Release
    sizes: list[LayerSize]
    steps: list[Placement]
    cost: Transition
    before: list[float | None]
    after: list[float | None]

    def cost_of(self, done: int) -> Transition:
        """Of the first `done` steps."""
        if done == len(self.steps):
            return self.cost
        before = self.release.placement
        return transition(self.sizes, before, self.steps[done - 1] if done else before)

    @property
    def gain(self) -> str:
        """What it is for, in words."""
        return f"balancedness of the hosts {mean_balancedness(self.before):.3f} -> {mean_balancedness(self.after):.3f}"

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
    return Round(
        state.release,
        sizes,
        steps(sizes, before, after, planner.balancing.max_moved_bytes, planner.limit_bytes),
        transition(sizes, before, after),
        layer_balancedness(before, demand, stages),
        layer_balancedness(after, demand, stages),
    )


def stepped(before: State, served: Release, placement: Placement) -> State:
    """One step of a round, from `served`. Raises RoundStopped when something else is served meanwhile."""
    if before.release is not served:
        raise RoundStopped("a round of balancing goes no further, because another change has been made meanwhile")
    return placed(before, placement)
