"""A load is played to the rounds of balancing that a controller does: what it would have moved, and how even its hosts would be."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeserve.bench.trace import Rows, TraceLine
from moeserve.control.changes import placed
from moeserve.control.demand import Demand
from moeserve.control.rounds import planned_round
from moeserve.placement import Transition, transition
from moeserve.simulate.cluster import SimulatedCluster


@dataclass(frozen=True, eq=False)
class Played:
    """After the last round: the cluster, and the rows that it was planned for.

    moves, new, moved_bytes: of all rounds, as in a `Transition`; plan_seconds: CPU time of the round that took longest
    """

    cluster: SimulatedCluster
    demand: Sequence[Rows]
    moves: int = 0
    new: int = 0
    moved_bytes: int = 0
    plan_seconds: float = 0.0


def played(cluster: SimulatedCluster, load: Sequence[TraceLine]) -> Played:
    """A round every balancing.interval_s of the load's time, when callers turn to other experts, and at its end.

    Raises ConfigError when experts do not fit.
    """
    balancing, counted = cluster.planner.balancing, [np.zeros(len(rows)) for rows in load[0].rows]
    demand = Demand([len(rows) for rows in counted], balancing.window_s)
    demand.hear({"": counted}, 0.0)
    now, next_at_s = Played(cluster, []), balancing.interval_s
    for line in load:
        counted = [so_far + rows for so_far, rows in zip(counted, line.rows, strict=True)]
        demand.hear({"": counted}, line.at_s)
        if demand.turned(line.at_s) or line.at_s >= next_at_s or line is load[-1]:
            now = balanced(now, demand.rows(line.at_s))
            next_at_s = line.at_s + balancing.interval_s
    return now


def balanced(before: Played, demand: Sequence[Rows]) -> Played:
    """After one more round. Raises ConfigError when experts do not fit."""
    cluster, started = before.cluster, time.process_time()
    planned = planned_round(cluster.state, demand, cluster.planner)
    seconds = time.process_time() - started
    state = placed(cluster.state, planned.steps[-1]) if planned.steps else cluster.state
    return replace(
        _with(before, planned.cost),
        cluster=replace(cluster, state=state),
        demand=demand,
        plan_seconds=max(before.plan_seconds, seconds),
    )


def after_loss(before: Played, lost: Collection[int]) -> Played:
    """The hosts in `lost` are gone: what they held is placed again, which is what `moves` and `moved_bytes` count; then comes a round."""
    found = changed(Played(before.cluster, before.demand, plan_seconds=before.plan_seconds), before.cluster.without(lost))
    after = balanced(found, before.demand)
    return replace(after, moves=found.moves, new=found.new, moved_bytes=found.moved_bytes)


def changed(before: Played, cluster: SimulatedCluster) -> Played:
    """The same service on other hosts, and what has moved to get there."""
    sizes = cluster.planner.sizes(cluster.planner.layers.sources)
    cost = transition(sizes, before.cluster.state.release.placement, cluster.state.release.placement)
    return replace(_with(before, cost), cluster=cluster)


def _with(before: Played, cost: Transition) -> Played:
    return replace(before, moves=before.moves + cost.moves, new=before.new + cost.new, moved_bytes=before.moved_bytes + cost.moved_bytes)
