"""Tokens go to the experts whose centroids they are most like, by cosine; weights are a softmax over the chosen cosines.

T tokens, H hidden size, E experts, K choices per token. Cosine routing: Chi et al. 2022, "On the Representation Collapse of Sparse
Mixture of Experts" (arXiv 2204.09179), there in a learned low dimension and with a temperature.
"""

from __future__ import annotations

import torch.nn.functional as F

from moeserve.errors import ConfigError, InvalidRequest
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.selection import select_top_k


def similarity(gate: GateInput) -> Selection:
    if gate.hidden_states is None:
        raise InvalidRequest("hidden_states is required: this layer routes by the similarity of tokens to centroids", "hidden_states")
    if gate.centroids is None:
        raise ConfigError("gating.routing = 'similarity' needs centroids, one [hidden_size] vector per expert")
    cosines = F.normalize(gate.hidden_states, dim=1) @ F.normalize(gate.centroids, dim=1).t()
    topk_ids = select_top_k(cosines, gate.gating.top_k)
    return Selection(cosines.softmax(dim=1), topk_ids, cosines.gather(1, topk_ids).softmax(dim=1))
