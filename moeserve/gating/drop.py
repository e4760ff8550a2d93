"""Which choices stay when more tokens want an expert than it has room for. T tokens, E experts, K choices, G capacity groups.

Every policy is an order in which choices are served; an expert serves the first C of each group and drops the rest.

position       token by token, and within a token choice by choice: Switch (arXiv 2101.03961), DeepSpeed `topkgating`
choice_major   all first choices before all second choices: GShard (arXiv 2006.16668, algorithm 1), DeepSpeed `top2gating`
probs          the largest scores first, equals in token order: Megatron-Core, DeepSpeed `topkgating`; close to the Batch
               Prioritized Routing of Riquelme et al. 2021 (arXiv 2106.05974), which ranks tokens by their best score
random         in an order drawn by chance: DeepSpeed `use_rts` (random token selection), ColossalAI select_policy `random`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moeserve.gating.chance import Chance
from moeserve.gating.segments import Segments


def position(topk_scores: Tensor, chance: Chance) -> Tensor:
    return torch.arange(topk_scores.numel(), device=topk_scores.device)


def choice_major(topk_scores: Tensor, chance: Chance) -> Tensor:
    return position(topk_scores, chance).view_as(topk_scores).t().flatten()


def probs(topk_scores: Tensor, chance: Chance) -> Tensor:
    return topk_scores.flatten().argsort(descending=True, stable=True)


def random(topk_scores: Tensor, chance: Chance) -> Tensor:
    return chance.uniform(topk_scores.shape[1]).flatten().argsort(stable=True)


#: value of `drop_policy` -> topk_scores [T, K] -> [T * K] int64, the choices t * K + k in the order they are served
DROP_POLICIES: Mapping[str, Callable[[Tensor, Chance], Tensor]] = {
    "position": position,
    "choice_major": choice_major,
    "probs": probs,
    "random": random,
}


def keep(topk_ids: Tensor, chosen: Tensor, order: Tensor, groups: Segments, room: Sequence[int]) -> Tensor:
    """[T, K] bool: the chosen choices that are served when an expert takes the first `room` [G] of each group.

    topk_ids [T, K] int64; chosen [T, K] bool, those that count; order [T * K] int64, the choices in the order they are served.
    """
    # Choices that do not count wait in one more cell, which has room for none.
    cells = groups.cells(topk_ids).masked_fill(~chosen.flatten(), groups.num_cells)
    kept = place_in_line(cells, order, groups.num_cells + 1) < torch.tensor([*room, 0], device=cells.device)[cells // groups.num_experts]
    return kept.view_as(topk_ids)


def place_in_line(cells: Tensor, order: Tensor, num_cells: int) -> Tensor:
    """[N] int64: how many of the same cell stand in front of each, when all stand in the given order.

    cells [N] int64 in 0..num_cells-1; order [N] int64, a permutation.
    """
    sorted_cells, line = cells[order].sort(stable=True)
    demand = torch.bincount(cells, minlength=num_cells)
    first = demand.cumsum(0) - demand
    places = torch.empty_like(cells)
    places[order[line]] = torch.arange(len(cells), device=cells.device) - first[sorted_cells]
    return places


def slots(topk_ids: Tensor, kept: Tensor, is_choice_major: bool, groups: Segments) -> Tensor:
    """[T, K] int64: the row of each kept choice among the rows its expert takes from the group, -1 where not kept.

    Rows are in token order, or all first choices before all second choices, as in the capacity buffers of GShard and DeepSpeed.
    """
    cells = groups.cells(topk_ids).masked_fill(~kept.flatten(), groups.num_cells)
    order = torch.arange(topk_ids.numel(), device=topk_ids.device)
    if is_choice_major:
        order = order.view_as(topk_ids).t().flatten()
    return place_in_line(cells, order, groups.num_cells + 1).view_as(topk_ids).masked_fill(~kept, -1)
