"""Which choices stay when more tokens want an expert than it has room for. T tokens, E experts, K choices, G capacity groups.

Every policy is an order in which choices are served; an expert serves the first C of each group and drops the rest.

position       token by token, and within a token choice by choice: Switch (arXiv 2101.03961), DeepSpeed `topkgating`
choice_major   all first choices before all second choices: GShard (arXiv 2006.16668, algorithm 1), DeepSpeed `top2gating`
probs          the largest scores first, equals in token order: Megatron-Core, DeepSpeed `topkgating`; close to the Batch
               Prioritized Routing of Riquelme et al. 2021 (arXiv 2106.05974), which ranks tokens by their best score
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moeserve.gating.segments import Segments


def position(topk_scores: Tensor) -> Tensor:
    return torch.arange(topk_scores.numel(), device=topk_scores.device)


def choice_major(topk_scores: Tensor) -> Tensor:
    return position(topk_scores).view_as(topk_scores).t().flatten()


def probs(topk_scores: Tensor) -> Tensor:
    return topk_scores.flatten().argsort(descending=True, stable=True)


#: value of `drop_policy` -> topk_scores [T, K] -> [T * K] int64, the choices t * K + k in the order they are served
DROP_POLICIES: Mapping[str, Callable[[Tensor], Tensor]] = {"position": position, "choice_major": choice_major, "probs": probs}


def keep(topk_ids: Tensor, chosen: Tensor, order: Tensor, groups: Segments, limits: Sequence[int]) -> Tensor:
    """[T, K] bool: the chosen choices that are served when an expert takes the first `limits` [G] of each group.

    topk_ids [T, K] int64; chosen [T, K] bool, those that count; order [T * K] int64, the choices in the order they are served.
    """
    # Choices that do not count wait in one more cell, which has room for none.
    cells = groups.cells(topk_ids).masked_fill(~chosen.flatten(), groups.num_cells)
    cells, line = cells[order].sort(stable=True)
    demand = torch.bincount(cells, minlength=groups.num_cells + 1)
    first = demand.cumsum(0) - demand
    rank = torch.arange(len(cells), device=cells.device) - first[cells]
    room = torch.tensor([*limits, 0], device=cells.device)
    kept = torch.empty_like(cells, dtype=torch.bool)
    kept[order[line]] = rank < room[cells // groups.num_experts]
    return kept.view_as(topk_ids)
