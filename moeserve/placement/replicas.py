"""How many copies every expert of a layer gets: the hottest first.

E experts; rows [E]: the load of each, which its copies share.
"""

from __future__ import annotations

import heapq

import numpy as np

from moeserve.placement.constraints import Floats
from moeserve.placement.layer import Integers


def trimmed(rows: Floats, copies: Integers, least: Integers, budget: int) -> Integers:
    """Fewer copies, `budget` in all or `least`: those go first whose expert stays coolest without them."""
    copies = copies.copy()
    for _ in range(int(copies.sum()) - budget):
        without = np.where(copies > least, rows / np.maximum(copies - 1, 1), np.inf)
        coolest = int(without.argmin())
        if np.isinf(without[coolest]):
            break
        copies[coolest] -= 1
    return copies


def grown(rows: Floats, copies: Integers, most: Integers, budget: int) -> Integers:
    """More copies, `budget` in all or `most`: each for the expert with the most rows per copy, which makes that maximum the least."""
    copies = copies.copy()
    hottest = [(-rows[expert] / copies[expert], expert) for expert in np.flatnonzero(copies < most).tolist()]
    heapq.heapify(hottest)
    for _ in range(budget - int(copies.sum())):
        if not hottest:
            break
        expert = hottest[0][1]
        copies[expert] += 1
        if copies[expert] < most[expert]:
            heapq.heapreplace(hottest, (-rows[expert] / copies[expert], expert))
        else:
            heapq.heappop(hottest)
    return copies


def shifted(rows: Floats, copies: Integers, bounds: tuple[Integers, Integers], margin: float) -> Integers:
    """As many copies, but from cool experts to hot ones, where the hot one has more rows per copy, by `margin`, than the cool one will."""
    copies, (least, most) = copies.copy(), bounds
    while True:
        per_copy = np.where(copies < most, rows / copies, -1.0)
        without = np.where(copies > least, rows / np.maximum(copies - 1, 1), np.inf)
        hot, cool = int(per_copy.argmax()), int(without.argmin())
        if per_copy[hot] <= (1 + margin) * without[cool]:
            return copies
        copies[hot] += 1
        copies[cool] -= 1
