"""Each token in turn goes to the K experts that have the fewest tokens so far: greedy list scheduling, Graham 1966.

T tokens, E experts, K choices per token. Loads start at 0 in every capacity group, grow with every used token, and the lowest id wins
among equals. All experts being equal at the start, the greedy choice deals the experts out in turn: choice k of the n-th used token is
expert (n * K + k) mod E. Weights are 1 / K.
"""

from __future__ import annotations

import torch

from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import softmax


def least_loaded(gate: GateInput) -> Selection:
    top_k, groups = gate.gating.top_k, gate.groups
    used = torch.ones_like(groups.ids) if gate.requests.used_token is None else gate.requests.used_token.long()
    used_before = used.cumsum(0) - used
    turn = used_before - (groups.used_tokens.cumsum(0) - groups.used_tokens)[groups.ids]
    choices = turn[:, None] * top_k + torch.arange(top_k, device=turn.device)
    topk_ids = choices % gate.num_experts
    return Selection(softmax(gate.router_logits), topk_ids, torch.full_like(topk_ids, 1 / top_k, dtype=torch.float32))
