"""Group-limited routing: a token chooses among the experts of its best groups only. T tokens, E experts, G groups of N = E / G.

DeepSeek-V2 (arXiv 2405.04434, section 2.2.2) bounds with it how many devices a token travels to. A group is as good as

max        its best expert: DeepSeek-V2
top2_sum   the sum of its two best experts: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)

Among equal groups the lowest comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError
from moeserve.gating.selection import select_top_k


def best(scores: Tensor) -> Tensor:
    return scores.amax(dim=2)


def top2_sum(scores: Tensor) -> Tensor:
    return scores.topk(min(2, scores.shape[2]), dim=2).values.sum(dim=2)


#: value of `group_score` -> scores [T, G, N] -> [T, G]
GROUP_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {"max": best, "top2_sum": top2_sum}


def select_in_groups(scores: Tensor, gating: GatingConfig) -> Tensor:
    """[T, E] float32 -> topk_ids [T, K], as `select_top_k` but within the token's best `topk_groups` groups.

    Raises ConfigError when the experts cannot be dealt into the groups, or the best groups have fewer than K experts.
    """
    num_groups, topk_groups = gating.num_expert_groups, gating.topk_groups
    assert num_groups is not None and topk_groups is not None
    num_tokens, num_experts = scores.shape
    _check(num_experts, gating.top_k, num_groups, topk_groups)
    by_group = scores.view(num_tokens, num_groups, -1)
    # In ascending order, so that the lowest expert still comes first among equals.
    groups = select_top_k(GROUP_SCORES[gating.group_score](by_group), topk_groups).sort(dim=1).values
    size = num_experts // num_groups
    candidates = by_group.gather(1, groups[:, :, None].expand(-1, -1, size)).flatten(1)
    picked = select_top_k(candidates, gating.top_k)
    return groups.gather(1, torch.div(picked, size, rounding_mode="floor")) * size + picked % size


def _check(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    if num_experts % num_groups:
        raise ConfigError(f"gating.num_expert_groups is {num_groups}, which does not divide the layer's {num_experts} experts")
    available = num_experts // num_groups * topk_groups
    if top_k > available:
        raise ConfigError(f"gating.top_k is {top_k}, but gating.topk_groups = {topk_groups} leaves {available} experts to choose from")
