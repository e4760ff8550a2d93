"""Group-limited routing: a token chooses among the experts of its best groups only. T tokens, E experts, G groups of N = E / G.

DeepSeek-V2 (arXiv 2405.04434, section 2.2.2) bounds with it how many devices a token travels to. A group is as good as

max        its best expert: DeepSeek-V2
top2_sum   the sum of its two best experts: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)

Among equal groups the lowest comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError
from moeserve.gating.selection import select_top_k


def best(scores: Tensor) -> Tensor:
    return scores.amax(dim=2)


def top2_sum(scores: Tensor) -> Tensor:
    # A knock-out tournament of halves: first and second of each pair, then of the winners. topk takes many times as long.
    size = scores.shape[2]
    if size & (size - 1):
        scores = F.pad(scores, (0, (1 << size.bit_length()) - size), value=-torch.inf)
    left, right = scores.chunk(2, dim=2)
    first, second = torch.maximum(left, right), torch.minimum(left, right)
    while first.shape[2] > 1:
        (left, right), seconds = first.chunk(2, dim=2), second.chunk(2, dim=2)
        first, second = torch.maximum(left, right), torch.maximum(torch.minimum(left, right), torch.maximum(*seconds))
    return (first + second)[:, :, 0]


#: value of `group_score` -> scores [T, G, N] -> [T, G]
GROUP_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {"max": best, "top2_sum": top2_sum}


def select_in_groups(scores: Tensor, gating: GatingConfig) -> Tensor:
    """[T, E] float32 -> topk_ids [T, K], as `select_top_k` but within the token's best `topk_groups` groups. Raises as `check_groups`."""
    num_groups, topk_groups = gating.num_expert_groups, gating.topk_groups
    assert num_groups is not None and topk_groups is not None
    num_tokens, num_experts = scores.shape
    check_groups(num_experts, gating)
    size = num_experts // num_groups
    by_group = scores.view(num_tokens, num_groups, size)
    # In ascending order, so that the lowest expert still comes first among equals.
    groups = select_top_k(GROUP_SCORES[gating.group_score](by_group), topk_groups).sort(dim=1).values
    rows = groups + torch.arange(num_tokens, device=groups.device)[:, None] * num_groups
    candidates = by_group.flatten(0, 1)[rows].flatten(1)
    picked = select_top_k(candidates, gating.top_k)
    return groups.gather(1, torch.div(picked, size, rounding_mode="floor")) * size + picked % size


def check_groups(num_experts: int, gating: GatingConfig) -> None:
    """Raises ConfigError when the experts cannot be dealt into the groups, or the best groups have fewer than K experts."""
    num_groups, topk_groups, top_k = gating.num_expert_groups, gating.topk_groups, gating.top_k
    if num_groups is None or topk_groups is None:
        return
    if num_experts % num_groups:
        raise ConfigError(f"gating.num_expert_groups is {num_groups}, which does not divide the layer's {num_experts} experts")
    if gating.group_score == "top2_sum" and num_experts == num_groups:
        raise ConfigError("gating.group_score = 'top2_sum' needs two experts in a group, but gating.num_expert_groups leaves one")
    available = num_experts // num_groups * topk_groups
    if top_k > available:
        raise ConfigError(f"gating.top_k is {top_k}, but gating.topk_groups = {topk_groups} leaves {available} experts to choose from")
