"""SparseMixer-v2 as it runs in inference: Liu et al. 2024, GRIN (arXiv 2409.12136), the router of Phi-3.5-MoE.

T tokens, E experts, K choices per token. Choice 1 is the largest logit m. Its weight is its share in a softmax over the experts near it,
those with (m - x) / max(|x|, m) <= 2 eps. Choice 2 is found the same way with choice 1 left out, and so on. The weights of a token need
not add up to 1.
"""

from __future__ import annotations

import torch

from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import softmax


def sparsemixer(gate: GateInput) -> Selection:
    logits, eps = gate.router_logits, gate.gating.sparsemixer_eps
    left, ids, weights = logits, [], []
    for _ in range(gate.gating.top_k):
        expert = left.argmax(dim=1, keepdim=True)
        largest = left.gather(1, expert)
        is_far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * eps
        ids.append(expert)
        weights.append(left.masked_fill(is_far, -torch.inf).softmax(dim=1).gather(1, expert))
        left = left.scatter(1, expert, -torch.inf)
    return Selection(softmax(logits), torch.cat(ids, dim=1), torch.cat(weights, dim=1))
