"""What a frontend has counted, for the metrics of another one: a frontend in a program has no page that anybody could look at.

E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from prometheus_client import Counter, Histogram

#: in the place of a drop's reason: the pairs were computed
COMPUTED: Final = "computed"


@dataclass(frozen=True)
class LayerCounted:
    """`tokens` used tokens were answered; pairs: by reason of a drop, or COMPUTED, [E] (token, expert) pairs as little-endian int64."""

    tokens: int = 0
    pairs: Mapping[str, bytes] = field(default_factory=dict)

    def since(self, before: LayerCounted) -> LayerCounted:
        """What has come after `before`."""
        pairs = {name: _pairs(each) - _pairs(before.pairs.get(name, bytes(len(each)))) for name, each in self.pairs.items()}
        return LayerCounted(self.tokens - before.tokens, {name: each.tobytes() for name, each in pairs.items()})

    def by_reason(self) -> dict[str, torch.Tensor]:
        """[E] int64 of each."""
        return {name: torch.from_numpy(_pairs(each).copy()) for name, each in self.pairs.items()}


@dataclass(frozen=True)
class Counted:
    """All that a frontend has counted since it started.

    series: by name of the metric and values of its labels, a counter's value, or the cumulative buckets of a histogram and its sum.
    """

    series: Mapping[tuple[str, ...], tuple[float, ...]] = field(default_factory=dict)
    layers: tuple[LayerCounted, ...] = ()

    def since(self, before: Counted) -> Counted:
        """What has come after `before`."""
        zeros = {key: (0.0,) * len(values) for key, values in self.series.items()}
        series = {
            key: tuple(max(0.0, now - then) for now, then in zip(values, before.series.get(key, zeros[key]), strict=True))
            for key, values in self.series.items()
        }
        old = before.layers or (LayerCounted(),) * len(self.layers)
        return Counted(series, tuple(now.since(then) for now, then in zip(self.layers, old, strict=True)))


Metric = Counter | Histogram


def series_of(name: str, metric: Metric) -> Iterable[tuple[tuple[str, ...], tuple[float, ...]]]:
    """All series of a metric, for `Counted.series`."""
    found: dict[tuple[str, ...], tuple[float, ...]] = {}
    for sample in (sample for family in metric.collect() for sample in family.samples):
        if sample.name.endswith(("_bucket", "_sum", "_total")):
            key = (name, *(value for label, value in sample.labels.items() if label != "le"))
            found[key] = (*found.get(key, ()), sample.value)
    return found.items()


def add_series(metric: Metric, labels: Sequence[str], values: Sequence[float]) -> None:
    """`values` more in the series of these labels."""
    child = metric.labels(*labels) if labels else metric
    if isinstance(child, Counter):
        child.inc(values[0])
        return
    # The library only adds one observation at a time.
    for bucket, (less, more) in zip(child._buckets, pairwise((0.0, *values[:-1])), strict=True):
        bucket.inc(more - less)
    child._sum.inc(values[-1])


def _pairs(packed: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.frombuffer(packed, "<i8")
