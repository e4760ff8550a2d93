"""The expert follows from the token id alone: Roller et al. 2021, "Hash Layers for Large Sparse Models" (arXiv 2106.04426).

T tokens, E experts, K choices per token. Choice 1 of token id i is FNV-1a(i) mod E, where FNV-1a is the 32-bit hash of Fowler, Noll and
Vo over the four bytes of i, low byte first: h = 2166136261, then for each byte h = (h xor byte) * 16777619 mod 2^32. Choice k > 1 hashes
the four bytes of k - 1 after those of i, as a salt, and takes the next free expert when the token has that one already. Weights are 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.errors import InvalidRequest
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import softmax

_OFFSET, _PRIME, _MASK = 2166136261, 16777619, 0xFFFFFFFF


def fnv1a(words: Tensor, state: Tensor | int = _OFFSET) -> Tensor:
    """32-bit hash of unsigned 32-bit numbers as four little-endian bytes each, int64 in and out; `state` of what came before."""
    hashed = torch.as_tensor(state, device=words.device)
    for shift in range(0, 32, 8):
        hashed = ((hashed ^ (words >> shift & 0xFF)) * _PRIME) & _MASK
    return hashed


def by_hash(gate: GateInput) -> Selection:
    if gate.token_ids is None:
        raise InvalidRequest("token_ids is required: this layer routes by the hash of the token id", "token_ids")
    if not ((gate.token_ids >= 0) & (gate.token_ids <= _MASK)).all():
        raise InvalidRequest(f"token_ids must be in 0..{_MASK}", "token_ids")
    num_experts, top_k = gate.num_experts, gate.gating.top_k
    state = fnv1a(gate.token_ids)
    topk_ids = gate.token_ids.new_empty(len(gate.token_ids), top_k)
    for k in range(top_k):
        expert = (state if k == 0 else fnv1a(torch.full_like(state, k), state)) % num_experts
        while (is_taken := (topk_ids[:, :k] == expert[:, None]).any(dim=1)).any():
            expert = torch.where(is_taken, (expert + 1) % num_experts, expert)
        topk_ids[:, k] = expert
    return Selection(softmax(gate.router_logits), topk_ids, torch.ones_like(topk_ids, dtype=torch.float32))
