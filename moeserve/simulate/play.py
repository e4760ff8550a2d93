"""A load is played to the rounds of balancing that a controller does: what it would have moved, and how even its hosts would be."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from moeserve.bench.trace import Piece, Rows
from moeserve.control.changes import placed
from moeserve.control.demand import Demand
from moeserve.control.rounds import planned_round
from moeserve.placement import transition
from moeserve.simulate.cluster import Cluster


@dataclass(frozen=True, eq=False)
class Played:
    """After the last round: the cluster, and the rows that it was planned for.

    moves, new, moved_bytes: of all rounds, as in a `Transition`; plan_seconds: of the round that took longest
    """

    cluster: Cluster
    demand: Sequence[Rows]
    moves: int
    new: int
    moved_bytes: int
    plan_seconds: float


def played(cluster: Cluster, load: Sequence[Piece], after_round: Callable[[Played], None] | None = None) -> Played:
    """A round every balancing.interval_s of the load's time, and one at its end. Raises ConfigError when experts do not fit."""
    balancing = cluster.planner.balancing
    experts = [len(rows) for rows in load[0].rows]
    demand, asked = Demand(experts, balancing.window_s), [rows * 0 for rows in load[0].rows]
    demand.hear({"": asked}, 0.0)
    now = Played(cluster, asked, 0, 0, 0, 0.0)
    next_at_s = balancing.interval_s
    for piece in load:
        asked = [so_far + rows for so_far, rows in zip(asked, piece.rows, strict=True)]
        demand.hear({"": asked}, piece.at_s)
        if piece.at_s >= next_at_s or piece is load[-1]:
            now = _round(now, demand.rows(piece.at_s))
            next_at_s = piece.at_s + balancing.interval_s
            if after_round is not None:
                after_round(now)
    return now


def _round(before: Played, demand: Sequence[Rows]) -> Played:
    cluster, started = before.cluster, time.perf_counter()
    planned = planned_round(cluster.state, demand, cluster.planner)
    seconds = time.perf_counter() - started
    state = placed(cluster.state, planned.steps[-1]) if planned.steps else cluster.state
    cost = planned.cost
    return Played(
        replace(cluster, state=state),
        demand,
        before.moves + cost.moves,
        before.new + cost.new,
        before.moved_bytes + cost.moved_bytes,
        max(before.plan_seconds, seconds),
    )


def after_loss(before: Played, lost: Collection[int]) -> Played:
    """The hosts in `lost` are gone: what they held is placed again, which is what `moves` and `moved_bytes` count; then comes a round."""
    cluster = before.cluster.without(lost)
    sizes = cluster.planner.sizes(cluster.planner.layers.sources)
    cost = transition(sizes, before.cluster.state.release.placement, cluster.state.release.placement)
    after = _round(replace(before, cluster=cluster), before.demand)
    return replace(after, moves=cost.moves, new=cost.new, moved_bytes=cost.moved_bytes)
