"""K distinct experts drawn by chance, each with weight 1 / K: the baseline every learned router is measured against.

T tokens, E experts, K choices per token. Zuo et al. 2022, "Taming Sparsely Activated Transformer with Stochastic Experts"
(arXiv 2110.04260) train with it.
"""

from __future__ import annotations

import torch

from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import softmax
from moeserve.gating.selection import select_top_k


def by_chance(gate: GateInput) -> Selection:
    top_k = gate.gating.top_k
    topk_ids = select_top_k(gate.chance.uniform(gate.num_experts), top_k)
    return Selection(softmax(gate.router_logits), topk_ids, torch.full_like(topk_ids, 1 / top_k, dtype=torch.float32))
