"""Tokens choose their K best experts: Shazeer et al. 2017 (arXiv 1701.06538). T tokens, E experts, K choices per token.

What is compared are the scores, plus what is added for selection only and never weighs anything:

* `score_correction_bias` b: chosen by s + b, weighed by s: DeepSeek-V3's balancing without a loss (arXiv 2408.15664); with
  `rank_by = "logits"` chosen by x + b, weighed by s
* Gumbel noise: chosen by x + G, which draws from softmax(x) (Jang et al. 2017, arXiv 1611.01144): DeepSpeed `RSample`, and for the
  second choice alone `top2_2nd_expert_sampling`, after GShard's random second expert
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.gating.expert_groups import select_in_groups
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import SCORING
from moeserve.gating.selection import largest, select_top_k


def learned(gate: GateInput) -> Selection:
    gating = gate.gating
    scores = SCORING[gating.scoring_func](gate.router_logits, gate.elementwise)
    if _is_by_scores(gate):
        return Selection(scores, *largest(scores, gating.top_k))
    topk_ids = _with_noise(gate, scores) if gating.noise in {"rsample", "gumbel_second"} else _by_rank(gate, scores)
    if gating.scoring_func == "softmax_topk":
        return Selection(scores, topk_ids, gate.router_logits.gather(1, topk_ids).softmax(dim=1))
    return Selection(scores, topk_ids, scores.gather(1, topk_ids))


def _is_by_scores(gate: GateInput) -> bool:
    """Whether the experts with the largest scores are chosen, whatever else there is."""
    gating = gate.gating
    is_ranked_by_logits = gating.rank_by == "logits" or gating.scoring_func == "softmax_topk"
    is_noisy, has_groups = gating.noise in {"rsample", "gumbel_second"}, gating.num_expert_groups is not None
    return not (is_noisy or has_groups or is_ranked_by_logits) and gate.score_correction_bias is None


def _by_rank(gate: GateInput, scores: Tensor) -> Tensor:
    # Logits and their softmax are in the same order, but logits do not vanish.
    by_logits = gate.gating.rank_by == "logits" or gate.gating.scoring_func == "softmax_topk"
    ranked = gate.router_logits if by_logits else scores
    if gate.score_correction_bias is not None:
        ranked = ranked + gate.score_correction_bias
    return select_top_k(ranked, gate.gating.top_k) if gate.gating.num_expert_groups is None else select_in_groups(ranked, gate.gating)


def _with_noise(gate: GateInput, scores: Tensor) -> Tensor:
    noisy = gate.router_logits + gate.chance.gumbel(gate.num_experts)
    if gate.gating.noise == "rsample":
        return select_top_k(noisy, gate.gating.top_k)
    first = select_top_k(scores, 1)
    return torch.cat([first, select_top_k(noisy.scatter(1, first, -torch.inf), 1)], dim=1)
