"""A day, simulated: a load that swings 4 : 1 and whose busy experts change, on a static fleet and on one that follows it.

`python benchmarks/bench_day.py --help`. Each fleet keeps the p99 of every hour below --p99-ms. The static ones have as few hosts as can do
that in the busiest hours: with experts as they are dealt, one copy each, and with balancing. The other one begins like that, and its
number of hosts follows the load too, by the rule of `[autoscaling]` with the highest target_busy that keeps the p99. Balancing and
autoscaling are the code of a controller; hosts, callers and time are imagined (docs/scaling.md). A change of the number of hosts is in
force one step later. As nothing is measured here, the same figures come of it on any machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moeserve.bench.costs import REFERENCE
from moeserve.config import AutoscalingConfig, load_config
from moeserve.control.autoscale import Bounds, Sizing
from moeserve.placement import balancedness
from moeserve.simulate import Played, SimulatedCluster, WhatIf, Workload, balanced, calls_on, changed, possible

Rows = npt.NDArray[np.float64]
LAYERS, EXPERTS, TOP_K, TOKENS, FRONTENDS, ZIPF, EXTRA_COPIES = 4, 128, 4, 256, 16, 0.8, 0.25
MOST_HOSTS = 128
DAY_S, HOUR_S = 86_400.0, 3600.0
TARGETS = (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
#: between two looks of the autoscaler within a step
LOOK_S = 15.0
#: how old the demand is that a round of balancing knows
OLD_S = 60.0


@dataclass(frozen=True)
class Day:
    """step_s: how often a fleet is looked at; peak: requests/s at the busiest time; swing: that, divided by the least."""

    step_s: float
    peak: float
    swing: float
    seed: int

    @property
    def steps(self) -> range:
        return range(int(DAY_S / self.step_s))

    def rate(self, at_s: float) -> float:
        """Least at the beginning of the day."""
        least = self.peak / self.swing
        return least + (self.peak - least) * (1 - math.cos(2 * math.pi * at_s / DAY_S)) / 2

    def rows(self, at_s: float) -> list[Rows]:
        """In a second: experts come and go as waves, each with a rhythm of its own of some hours; Zipf's law by their order at the time."""
        drawn = np.random.default_rng(self.seed)
        rows = []
        for _ in range(LAYERS):
            phase, hours = drawn.uniform(0, 2 * math.pi, EXPERTS), drawn.uniform(4, 12, EXPERTS)
            height = np.sin(2 * math.pi * at_s / (HOUR_S * hours) + phase)
            weights = (1.0 + (-height).argsort().argsort()) ** -ZIPF
            rows.append(possible(weights / weights.sum(), TOP_K) * self.rate(at_s) * TOKENS * TOP_K / LAYERS)
        return rows


@dataclass
class Fleet:
    """What became of one. latencies_s: by hour."""

    hosts: list[int] = field(default_factory=list)
    latencies_s: dict[int, list[Rows]] = field(default_factory=dict)
    even: list[float] = field(default_factory=list)
    moved_bytes: int = 0

    def hear(self, day: Day, step: int, now: Played, latencies_s: Rows) -> None:
        self.hosts.append(len(now.cluster.state.assignments))
        self.latencies_s.setdefault(int(step * day.step_s / HOUR_S), []).append(latencies_s)
        self.even.append(balancedness(now.cluster.state.release.placement, now.demand))
        self.moved_bytes = now.moved_bytes

    @property
    def p99_ms(self) -> float:
        """Of the worst hour."""
        return max(1e3 * float(np.quantile(np.concatenate(each), 0.99)) for each in self.latencies_s.values())

    def host_hours(self, day: Day) -> float:
        return sum(self.hosts) * day.step_s / HOUR_S


def lived(day: Day, steps: Sequence[int], hosts: int, is_balanced: bool, target: float | None = None, most_ms: float = math.inf) -> Fleet:
    """target: target_busy, None = always so many hosts. It ends early after an hour with a p99 above most_ms."""
    layer = {
        "hidden_size": REFERENCE.hidden_size,
        "intermediate_size": REFERENCE.intermediate_size,
        "num_experts": EXPERTS,
        "gating": {"top_k": TOP_K},
    }
    config = load_config({"layers": [layer] * LAYERS, "balancing": {"extra_copies": EXTRA_COPIES if is_balanced else 0.0}})
    now, fleet = Played(SimulatedCluster.of(config, hosts), day.rows(steps[0] * day.step_s)), Fleet()
    sizing = None if target is None else Sizing(AutoscalingConfig(enabled=True, target_busy=target))
    for step in steps:
        if (step * day.step_s) % HOUR_S == 0 and fleet.hosts and fleet.p99_ms > most_ms:
            break
        at_s = step * day.step_s
        now = replace(balanced(now, day.rows(at_s - OLD_S)) if is_balanced else now, demand=day.rows(at_s))
        what_if = WhatIf(Workload(TOKENS, 1, FRONTENDS, rate=day.rate(at_s)), REFERENCE, seed=step)
        calls = calls_on(now, what_if)
        fleet.hear(day, step, now, calls.latencies_s)
        if sizing is not None:
            placed = list(now.cluster.state.release.placement.hosts)
            wanted = resized(sizing, at_s, day.step_s, float(calls.busy[placed].sum()), len(placed))
            if wanted != len(placed):
                now = changed(now, now.cluster.resized(wanted))
    return fleet


def resized(sizing: Sizing, begin_s: float, step_s: float, work: float, hosts: int) -> int:
    """How many hosts there will be at the end of a step in which `work` hosts would be busy all the time."""
    for number in range(int(step_s / LOOK_S)):
        decided = sizing.decide(begin_s + number * LOOK_S, hosts, [min(1.0, work / hosts)] * hosts, Bounds(2, MOST_HOSTS))
        hosts = hosts if decided is None else decided.wanted
    return hosts


def fewest(keeps: Callable[[int], bool], most: int) -> int:
    """The smallest number of hosts that keeps the p99: more never do worse."""
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return low


def fleets(day: Day, p99_ms: float) -> Iterator[tuple[str, Fleet]]:
    busiest = [step for step in day.steps if day.rate(step * day.step_s) > 0.93 * day.peak]
    sizes = []
    for name, is_balanced in (("static, as dealt", False), ("static, balanced", True)):
        sizes.append(fewest(lambda hosts: lived(day, busiest, hosts, is_balanced, None, p99_ms).p99_ms <= p99_ms, MOST_HOSTS))  # noqa: B023
        yield name, lived(day, day.steps, sizes[-1], is_balanced)
    for target in TARGETS:
        fleet = lived(day, day.steps, sizes[-1], True, target, p99_ms)
        if fleet.p99_ms <= p99_ms:
            yield f"balanced and autoscaled, target_busy {target:g}", fleet
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=200, help="requests/s")
    parser.add_argument("--swing", type=float, default=4, help="peak, divided by the least")
    parser.add_argument("--p99-ms", type=float, default=60)
    parser.add_argument("--step-s", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    day, hours = Day(options.step_s, options.peak, options.swing, options.seed), None
    print(
        f"{LAYERS} layers of {EXPERTS} experts, top {TOP_K}; {TOKENS} tokens a request, {day.peak / day.swing:g} to {day.peak:g} requests/s"
    )
    print("| fleet | hosts | host-hours | saved | p99 ms, worst hour | balancedness | GiB moved |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, fleet in fleets(day, options.p99_ms):
        used = fleet.host_hours(day)
        hours = hours or used
        most = f"{min(fleet.hosts)}..{max(fleet.hosts)}" if len(set(fleet.hosts)) > 1 else f"{fleet.hosts[0]}"
        even, moved = float(np.mean(fleet.even)), fleet.moved_bytes / 2**30
        print(f"| {name} | {most} | {used:.0f} | {1 - used / hours:.1%} | {fleet.p99_ms:.1f} | {even:.2f} | {moved:.0f} |", flush=True)


if __name__ == "__main__":
    main()
