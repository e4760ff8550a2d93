"""Figures computed from a service's counts: quantiles, balance, and the snapshot as JSON."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from moeserve.observe.call_times import METHODS
from moeserve.observe.records import plain
from moeserve.observe.stats import Durations, LayerStats, ServiceStats, host_name

_QUANTILES: Final = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}


def quantile_ms(durations: Durations, q: float) -> float | None:
    """As Prometheus' `histogram_quantile`: linear within a bucket, so no more exact than the buckets; None where nothing was counted."""
    rank = q * sum(durations.counts)
    if not rank:
        return None
    below, lower_s = 0, 0.0
    for upper_s, count in zip(durations.upper_bounds_s, durations.counts, strict=False):
        if count and below + count >= rank:
            return 1000 * (lower_s + (upper_s - lower_s) * (rank - below) / count)
        below, lower_s = below + count, upper_s
    return 1000 * lower_s


def added(histograms: Sequence[Durations], name: str) -> Durations:
    """The sum of histograms with the same bounds; empty if there are none."""
    if not histograms:
        return Durations(name, (), (0,), 0.0)
    counts = [sum(column) for column in zip(*(one.counts for one in histograms), strict=True)]
    return Durations(name, histograms[0].upper_bounds_s, counts, sum(one.sum_s for one in histograms))


def since(now: Sequence[Durations], before: Sequence[Durations]) -> list[Durations]:
    """The counts between two snapshots."""
    old = {one.name: one for one in before}
    return [
        replace(
            one,
            counts=[new - then for new, then in zip(one.counts, old[one.name].counts, strict=True)],
            sum_s=one.sum_s - old[one.name].sum_s,
        )
        if one.name in old
        else one
        for one in now
    ]


def forwards(stats: ServiceStats) -> list[Durations]:
    """Those of the calls that run tokens."""
    return [one for one in stats.requests if one.name in METHODS]


def demand(layer: LayerStats) -> list[int]:
    """[E]: (token, expert) pairs that the gate requested."""
    return [done + lost for done, lost in zip(layer.processed_by_expert, layer.dropped_by_expert, strict=True)]


def counts_on(now: ServiceStats, before: ServiceStats) -> bool:
    """Whether `now` goes on where `before` was; else it is of another frontend behind the same address, or of one that started again.

    The uptime alone does not tell: what has taken the place of another may have run for longer.
    """
    if now.uptime_s < before.uptime_s or [layer.name for layer in now.layers] != [layer.name for layer in before.layers]:
        return False
    counted: list[tuple[Sequence[int], Sequence[int]]] = [
        ((new.tokens, *demand(new)), (old.tokens, *demand(old))) for new, old in zip(now.layers, before.layers, strict=True)
    ]
    for timed, earlier in ((now.requests, before.requests), (now.stages, before.stages)):
        counts = {one.name: one.counts for one in timed}
        counted += [(counts.get(old.name, ()), old.counts) for old in earlier]
    return all(len(new) == len(old) and all(map(operator.ge, new, old)) for new, old in counted)


def host_rows(layer: LayerStats, rows: Sequence[float]) -> dict[int, float]:
    """Rows expected on each host, by its number, if the copies of each expert share its `rows` [E] evenly."""
    copies = Counter(unit for held in layer.placement for unit in zip(held.experts, held.shards, strict=True))
    return {
        held.host: sum(rows[unit[0]] / copies[unit] for unit in zip(held.experts, held.shards, strict=True)) for held in layer.placement
    }


def host_shares(layers: Sequence[LayerStats], rows: Sequence[Sequence[float]]) -> dict[int, float]:
    """The share of each host, by its number, in the rows expected on all of them, of all layers; `rows`: [E] of each."""
    expected: dict[int, float] = defaultdict(float)
    for layer, wanted in zip(layers, rows, strict=True):
        for host, part in host_rows(layer, wanted).items():
            expected[host] += part
    whole = sum(expected.values())
    return {host: part / whole for host, part in expected.items()} if whole else {}


def balancedness(demand: Sequence[int]) -> float:
    """Mean / max of the experts' demand [E]: 1 = equal, 1 / E = one expert has everything; 1 without demand."""
    most = max(demand, default=0)
    return sum(demand) / len(demand) / most if most else 1.0


def as_json(stats: ServiceStats) -> dict[str, Any]:
    """The snapshot as a JSON object, with figures computed from it; hosts by name."""
    said = plain(stats)
    shares = host_shares(stats.layers, [demand(layer) for layer in stats.layers])
    for host in said["hosts"]:
        host["demand_share"] = shares.get(host.pop("number"), 0.0)
    for layer, told in zip(stats.layers, said["layers"], strict=True):
        told["balancedness"] = balancedness(demand(layer))
        for held in told["placement"]:
            held["host"] = host_name(held["host"])
    for durations, told in zip((*stats.requests, *stats.stages), (*said["requests"], *said["stages"]), strict=True):
        told.update({name: quantile_ms(durations, q) for name, q in _QUANTILES.items()})
    return said
