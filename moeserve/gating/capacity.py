"""How many rows one expert may take from one capacity group. T tokens of the group, E experts, K choices per token.

Capacity is the idea of GShard, Lepikhin et al. 2020 (arXiv 2006.16668), its factor that of Switch, Fedus et al. 2021
(arXiv 2101.03961, eq. 3). As in DeepSpeed, T counts every token of the group, the unused ones too.

ceil       C = ceil(K * cf * T / E), exact: cf = 1.2 means 12/10, not the nearest binary number
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moeserve.config import GatingConfig


def ceil(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """T=25, E=2, cf=1.2, K=1 -> 15, where float32 arithmetic says 16."""
    return math.ceil(Fraction(str(capacity_factor)) * top_k * num_tokens / num_experts)


#: value of `capacity_rule` -> (T, E, K, cf) -> capacity before `min_capacity`
CAPACITY_RULES: Mapping[str, Callable[[int, int, int, float], int]] = {"ceil": ceil}


@dataclass(frozen=True)
class Groups:
    """Consecutive runs of tokens that share a capacity: the size of each, and for each request the first group it is in."""

    sizes: Sequence[int]
    of_request: Sequence[int]


def per_request(request_sizes: Sequence[int]) -> Groups:
    """A request's answer does not depend on the company it is run in."""
    return Groups(request_sizes, range(len(request_sizes)))


def whole_batch(request_sizes: Sequence[int]) -> Groups:
    """Everything that is run at once shares the experts' room."""
    return Groups([sum(request_sizes)], [0] * len(request_sizes))


#: value of `capacity_scope` -> request sizes [R] -> groups
CAPACITY_SCOPES: Mapping[str, Callable[[Sequence[int]], Groups]] = {"request": per_request, "batch": whole_batch}


@dataclass(frozen=True)
class Capacity:
    """`limits` [G]: rows an expert may take from each group; `of_request` [R]: the limit each request reports."""

    group_sizes: Sequence[int]
    limits: Sequence[int]
    of_request: tuple[int, ...]

    @property
    def can_overflow(self) -> bool:
        """False when no demand can exceed the limits, because a token asks an expert at most once."""
        return any(limit < size for limit, size in zip(self.limits, self.group_sizes, strict=True))


def capacity(gating: GatingConfig, request_sizes: Sequence[int], num_experts: int, top_k: int) -> Capacity | None:
    """The capacities of a batch; None = no limit."""
    factor = gating.capacity_factor
    if factor is None or not gating.drop_tokens:
        return None
    groups = CAPACITY_SCOPES[gating.capacity_scope](request_sizes)
    rule = CAPACITY_RULES[gating.capacity_rule]
    by_size = {size: max(rule(size, num_experts, top_k, factor), gating.min_capacity) for size in set(groups.sizes)}
    limits = [by_size[size] for size in groups.sizes]
    return Capacity(groups.sizes, limits, tuple(limits[group] for group in groups.of_request))
