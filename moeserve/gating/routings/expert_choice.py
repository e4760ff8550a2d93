"""Experts choose their C best tokens: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368).

T tokens, E experts. S = softmax over experts; expert e takes the C tokens of each capacity group with the largest S[:, e],
C = max(1, floor(cf * T / E)). Every expert is equally loaded and nothing is dropped, but a token may be taken by 0 to E experts.
Among equal scores the lowest position comes first.
"""

from __future__ import annotations

import torch

from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import SCORING


def expert_choice(gate: GateInput) -> Selection:
    """K = E: a token's columns are all experts by descending score, and `chosen` says which of them took it."""
    scores = SCORING[gate.gating.scoring_func](gate.router_logits, gate.elementwise)
    if gate.requests.used_token is not None:
        scores = scores.masked_fill(~gate.requests.used_token[:, None], -1.0)  # below every score, so behind every used token
    assert gate.capacity is not None, "checked by GatingConfig"
    taken = torch.cat(
        [_best(part, limit) for part, limit in zip(scores.split(gate.capacity.group_sizes), gate.capacity.limits, strict=True)]
    )
    scores = scores.clamp(min=0.0)
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = taken.gather(1, order) & gate.requests.chosen(order)
    return Selection(scores, order, scores.gather(1, order), kept=chosen, chosen=chosen)


def _best(scores: torch.Tensor, limit: int) -> torch.Tensor:
    """[T, E] bool: the `limit` largest of each column."""
    first = scores.argsort(dim=0, descending=True, stable=True)[:limit]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, first, True)
