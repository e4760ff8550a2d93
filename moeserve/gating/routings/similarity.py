"""Tokens go to the experts whose centroids they are most like, by cosine; weights are a softmax over the chosen cosines.

T tokens, H hidden size, E experts, K choices per token. Cosine routing: Chi et al. 2022, "On the Representation Collapse of Sparse
Mixture of Experts" (arXiv 2204.09179), there in a learned low dimension and with a temperature.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moeserve.api.tensors import is_finite
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.selection import select_top_k


def similarity(gate: GateInput) -> Selection:
    if gate.hidden_states is None:
        raise InvalidRequest("hidden_states is required: this layer routes by the similarity of tokens to centroids", "hidden_states")
    if gate.centroids is None:
        raise ConfigError("gating.routing = 'similarity' needs centroids, one [hidden_size] vector per expert")
    tokens, centroids = gate.hidden_states, gate.centroids
    if tokens.shape[1] != centroids.shape[1]:
        raise InvalidRequest(f"hidden_states are {tokens.shape[1]} wide; the centroids have {centroids.shape[1]} numbers", "hidden_states")
    if not is_finite(tokens):
        token = int((~tokens.isfinite()).any(dim=1).nonzero()[0])
        raise InvalidRequest(f"hidden_states of token {token} is not finite (NaN or Inf)", "hidden_states")
    cosines = _directions(tokens) @ _directions(centroids).t()
    topk_ids = select_top_k(cosines, gate.gating.top_k)
    return Selection(cosines.softmax(dim=1), topk_ids, cosines.gather(1, topk_ids).softmax(dim=1))


def _directions(rows: Tensor) -> Tensor:
    """[N, H] -> rows of length 1, or 0 where they were. Squares of what is not near 1 leave float32."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    return F.normalize(rows / largest.where(largest > 0, 1), dim=1)
