"""Seconds that depend on a size, as they were measured at some sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from moeserve.bench.trace import Rows


@dataclass(frozen=True)
class Curve:
    """`points`: (size, seconds) by growing size. Between them run straight lines; the last one goes on."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def line(cls, fixed_s: float, each_s: float) -> Curve:
        """fixed_s + each_s * size."""
        return cls(((0.0, fixed_s), (1.0, fixed_s + each_s)))

    def at(self, sizes: Rows) -> Rows:
        """Below the first point, what holds there."""
        known, seconds = np.array(self.points).T
        return np.asarray(np.interp(sizes, known, seconds) + np.maximum(sizes - known[-1], 0) * self.slope)

    def seconds(self, size: float) -> float:
        """As `at`, for one size."""
        return float(self.at(np.array([size]))[0])

    @property
    def slope(self) -> float:
        """Seconds of one more, beyond the last point."""
        (near, near_s), (far, far_s) = self.points[-2:] if len(self.points) > 1 else ((0.0, 0.0), self.points[0])
        return max(0.0, (far_s - near_s) / (far - near)) if far > near else 0.0

    def scaled(self, factor: float) -> Curve:
        """All seconds times `factor`."""
        return Curve(tuple((size, factor * seconds) for size, seconds in self.points))

    def stretched(self, factor: float) -> Curve:
        """What is beyond the first point times `factor`."""
        first_s = self.points[0][1]
        return Curve(tuple((size, first_s + factor * (seconds - first_s)) for size, seconds in self.points))


def growing(sizes: Sequence[float], seconds: Sequence[float], least_step: float = 1.0) -> Curve:
    """Through measurements in order of size: a larger one never takes less; sizes closer than by the factor `least_step` are one."""
    groups: list[list[tuple[float, float]]] = []
    for point in zip(sizes, seconds, strict=True):
        if groups and point[0] < groups[-1][0][0] * least_step:
            groups[-1].append(point)
        else:
            groups.append([point])
    known, means = np.array([np.mean(group, axis=0) for group in groups]).T
    return Curve(tuple(zip(known.tolist(), _never_less(means.tolist()), strict=True)))


def _never_less(values: Sequence[float]) -> list[float]:
    """The closest values that do not fall: neighbors that do are replaced by their mean (pool adjacent violators, Ayer et al. 1955)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [fmean(pool) for pool in pools for _ in pool]
