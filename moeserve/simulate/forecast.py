"""The answer of `moeserve simulate`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeserve.bench.costs import Costs
from moeserve.bench.trace import Rows, TraceLine
from moeserve.errors import ConfigError
from moeserve.placement import Placement, balancedness, host_rows, plan_placement
from moeserve.simulate.calls import Calls, Workload, simulated_calls
from moeserve.simulate.cluster import SimulatedCluster
from moeserve.simulate.cores import Cores
from moeserve.simulate.play import Played, after_loss, played
from moeserve.simulate.work import LayerWork


@dataclass(frozen=True, eq=False)
class WhatIf:
    """What is asked: callers' `workload`, at these `costs`; cores of each node, None = enough; fail: hosts, or nodes, that are lost."""

    workload: Workload
    costs: Costs
    cores_per_node: int | None = None
    fail: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Forecast:
    """balancedness_before: of one copy of each expert, as dealt; lost_experts: without a live copy, None = nothing was to fail.

    before, after: those placements, with the rows they are for
    """

    balancedness: float
    balancedness_before: float
    lost_experts: int | None
    now: Played
    calls: Calls
    costs: Costs
    before: Placement

    def as_json(self) -> dict[str, Any]:
        """Only plan_seconds differs when it is asked again."""
        return {
            "balancedness": self.balancedness,
            "balancedness_before": self.balancedness_before,
            "plan_seconds": self.now.plan_seconds,
            "tokens_per_s": self.calls.tokens_per_s,
            "p99_ms": self.calls.p99_ms,
            "moves": self.now.moves,
            "new": self.now.new,
            "moved_bytes": self.now.moved_bytes,
            **({} if self.lost_experts is None else {"lost_experts": self.lost_experts}),
            "hosts": len(self.now.cluster.state.assignments),
            "costs": {name: value for name, value in asdict(self.costs).items() if name != "spread"},
        }

    def loads(self) -> tuple[Rows, Rows]:
        """[D] before and after: rows of each host, the mean over the layers that are asked; the mean over the hosts is 1."""
        return _relative(self.before, self.now.demand), _relative(self.now.cluster.state.release.placement, self.now.demand)


def simulated(cluster: SimulatedCluster, load: Sequence[TraceLine], what_if: WhatIf) -> Forecast:
    """Plays the load to the balancing, then fails, then calls. Raises ConfigError when experts do not fit, or nothing would be left."""
    planner, drawn = cluster.planner, np.random.default_rng(what_if.seed)
    lost = _lost(cluster, what_if.fail, drawn)
    before = plan_placement(planner.layers.specs, planner.placing.model_copy(update={"copies": 1, "experts_per_host": None}))
    now, lost_experts = played(cluster, load), None
    if what_if.fail:
        lost_experts = experts_without_copy(now.cluster.state.release.placement, lost)
        now = after_loss(now, lost)
    placement, stages = now.cluster.state.release.placement, planner.placing.pipeline_stages
    return Forecast(
        balancedness(placement, now.demand, stages),
        balancedness(before, now.demand, stages),
        lost_experts,
        now,
        calls_on(now, what_if),
        what_if.costs,
        before,
    )


def calls_on(now: Played, what_if: WhatIf) -> Calls:
    """The workload on a cluster as it is, with the demand that it was planned for."""
    planner, placement = now.cluster.planner, now.cluster.state.release.placement
    work = [
        LayerWork(
            layer,
            rows / rows.sum() if rows.sum() > 0 else np.full(len(rows), 1 / len(rows)),
            spec.gating.top_k,
            what_if.costs.scaled(spec.hidden_size, spec.intermediate_size) if spec.intermediate_size else what_if.costs,
            planner.placing.copy_choice,
        )
        for layer, rows, spec in zip(placement.layers, now.demand, planner.layers.specs, strict=True)
    ]
    cores = Cores(now.cluster.nodes, what_if.cores_per_node)
    return simulated_calls(placement, work, what_if.workload, cores, work[0].costs, what_if.seed)


def experts_without_copy(placement: Placement, lost: Collection[int]) -> int:
    """Of all layers: those whose every copy is on hosts that are lost."""
    is_live = ~np.isin(np.arange(placement.num_hosts), list(lost))
    return sum(int((layer.live_copies(is_live) == 0).sum()) for layer in placement.layers)


def _lost(cluster: SimulatedCluster, fail: int, drawn: np.random.Generator) -> set[int]:
    """Random hosts; where there are nodes, those of random nodes."""
    nodes = cluster.nodes
    names = sorted(set(nodes.values()), key=lambda name: int(name.rpartition("-")[2]))
    if not 0 <= fail < len(names):
        what = "hosts" if cluster.num_nodes is None else "nodes"
        raise ConfigError(f"--fail is {fail}; allowed: 0 to {len(names) - 1}, because one of {len(names)} {what} must be left")
    gone = {names[index] for index in drawn.choice(len(names), fail, replace=False)}
    return {host for host, node in nodes.items() if node in gone}


def _relative(placement: Placement, demand: Sequence[Rows]) -> Rows:
    hosts = list(placement.hosts)
    known = [(layer, rows) for layer, rows in zip(placement.layers, demand, strict=True) if rows.sum() > 0]
    if not known:
        return np.ones(len(hosts))
    loads = [host_rows(layer, rows)[hosts] for layer, rows in known]
    return np.asarray(np.mean([each / each.mean() for each in loads], axis=0))
