"""How many rows one expert may take from one capacity group. T tokens of the group, E experts, K choices per token.

Capacity is the idea of GShard, Lepikhin et al. 2020 (arXiv 2006.16668), its factor that of Switch, Fedus et al. 2021
(arXiv 2101.03961, eq. 3). As in DeepSpeed, T counts every token of the group, the unused ones too. The systems differ in how
they round, and in the arithmetic they round from:

ceil               ceil(K * cf * T / E), exact: cf = 1.2 means 12/10, not the nearest binary number
deepspeed          ceil(f32(T / E) * f32(cf * K)): the factors in float64, each rounded to float32, then a float32 product
colossalai_legacy  floor(cf * T / E), then up to an even number; no factor K even for top-2 (0.1.0 - 0.1.10)
colossalai         floor(K * cf * T / E), then up to an even number, in float64 (0.1.11 and later)
mindformers        ceil(K * T * cf / E) in float64
mindformers_v2     min(ceil(K * T * cf / E), T); there `capacity_multiple` is model_parallel * comp_comm_parallel_degree
trustformers       ceil(cf * T * K / E) in float32

`min_capacity` bounds each from below, then it is rounded up to a multiple of `capacity_multiple`. When experts choose
(routing = "expert_choice"), each takes exactly max(1, floor(cf * T / E)) tokens: Zhou et al. 2022 (arXiv 2202.09368).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from moeserve.config import GatingConfig

#: no demand comes near it; larger products are cut here, because a float that large need not fit an integer
_MOST = float(2**62)


def ceil(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """T=25, E=2, cf=1.2, K=1 -> 15, where float32 arithmetic says 16."""
    return math.ceil(Fraction(str(capacity_factor)) * top_k * num_tokens / num_experts)


def deepspeed(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """T=25, E=2, cf=1.2, K=1 -> 16; T=100, E=2, cf=1.1, K=1 -> 55, where float64 arithmetic says 56."""
    share, factor = torch.tensor([num_tokens / num_experts, capacity_factor * top_k], dtype=torch.float32)
    return math.ceil(min(float(share * factor), _MOST))


def colossalai_legacy(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    rows = math.floor(min(capacity_factor * num_tokens / num_experts, _MOST))
    return rows + rows % 2


def colossalai(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    return colossalai_legacy(num_tokens, num_experts, 1, top_k * capacity_factor)


def mindformers(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    return math.ceil(min(top_k * num_tokens * capacity_factor / num_experts, _MOST))


def mindformers_v2(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    return min(mindformers(num_tokens, num_experts, top_k, capacity_factor), num_tokens)


def trustformers(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    factor, tokens, choices, experts = torch.tensor([capacity_factor, num_tokens, top_k, num_experts], dtype=torch.float32)
    return math.ceil(min(float(factor * tokens * choices / experts), _MOST))


#: value of `capacity_rule` -> (T, E, K, cf) -> capacity before `min_capacity`
CAPACITY_RULES: Mapping[str, Callable[[int, int, int, float], int]] = {
    "ceil": ceil,
    "deepspeed": deepspeed,
    "colossalai": colossalai,
    "colossalai_legacy": colossalai_legacy,
    "mindformers": mindformers,
    "mindformers_v2": mindformers_v2,
    "trustformers": trustformers,
}


def expert_choice(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """How many tokens an expert takes when experts choose; `top_k` plays no part. T = 0 leaves nothing to take."""
    return min(max(1, math.floor(Fraction(str(capacity_factor)) * num_tokens / num_experts)), num_tokens)


@dataclass(frozen=True)
class Groups:
    """Consecutive runs of tokens that share a capacity: the size of each, and for each request the first group it is in."""

    sizes: Sequence[int]
    of_request: Sequence[int]


def per_request(request_sizes: Sequence[int], gating: GatingConfig) -> Groups:
    """A request's answer does not depend on the company it is run in."""
    return Groups(request_sizes, range(len(request_sizes)))


def whole_batch(request_sizes: Sequence[int], gating: GatingConfig) -> Groups:
    """Everything that is run at once shares the experts' room."""
    return Groups([sum(request_sizes)], [0] * len(request_sizes))


def fixed_size(request_sizes: Sequence[int], gating: GatingConfig) -> Groups:
    """GShard's groups of `expert_group_size` tokens, cut from each request by itself; its last group has what is left."""
    assert gating.expert_group_size is not None, "checked by GatingConfig"
    sizes: list[int] = []
    of_request: list[int] = []
    for request_size in request_sizes:
        of_request.append(len(sizes))
        whole, rest = divmod(request_size, gating.expert_group_size)
        sizes += [gating.expert_group_size] * whole + [rest] * (rest > 0 or whole == 0)
    return Groups(sizes, of_request)


#: value of `capacity_scope` -> request sizes [R] -> groups
CAPACITY_SCOPES: Mapping[str, Callable[[Sequence[int], GatingConfig], Groups]] = {
    "request": per_request,
    "batch": whole_batch,
    "group": fixed_size,
}


@dataclass(frozen=True)
class Capacity:
    """`limits` [G]: rows an expert may take from each group; `of_request` [R]: the limit each request reports."""

    group_sizes: Sequence[int]
    limits: Sequence[int]
    of_request: tuple[int, ...]

    @property
    def room(self) -> list[int]:
        """[G]: what an expert can be asked to take at most; a limit may be larger than any tensor can hold."""
        return [min(limit, size) for limit, size in zip(self.limits, self.group_sizes, strict=True)]

    @property
    def can_overflow(self) -> bool:
        """False when no demand can exceed the limits, because a token asks an expert at most once."""
        return any(limit < size for limit, size in zip(self.limits, self.group_sizes, strict=True))


def capacity(gating: GatingConfig, request_sizes: Sequence[int], num_experts: int, top_k: int) -> Capacity | None:
    """The capacities of a batch; None = no limit."""
    if gating.capacity_factor is None or not gating.drop_tokens:
        return None
    groups = CAPACITY_SCOPES[gating.capacity_scope](request_sizes, gating)
    by_size = {size: _rows(gating, size, num_experts, top_k) for size in set(groups.sizes)}
    limits = [by_size[size] for size in groups.sizes]
    return Capacity(groups.sizes, limits, tuple(limits[group] for group in groups.of_request))


def _rows(gating: GatingConfig, num_tokens: int, num_experts: int, top_k: int) -> int:
    assert gating.capacity_factor is not None
    if gating.routing == "expert_choice":
        return expert_choice(num_tokens, num_experts, top_k, gating.capacity_factor)
    rows = CAPACITY_RULES[gating.capacity_rule](num_tokens, num_experts, top_k, gating.capacity_factor) if num_tokens else 0
    rows = max(rows, gating.min_capacity)
    return -(-rows // gating.capacity_multiple) * gating.capacity_multiple
