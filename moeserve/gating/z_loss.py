"""Router z-loss: mean over tokens of logsumexp(x)^2, large when logits are: Zoph et al. 2022, ST-MoE (arXiv 2202.08906, eq. 5).

T tokens, E experts, R requests.
"""

from __future__ import annotations

from torch import Tensor

from moeserve.gating.segments import Segments


def z_loss(router_logits: Tensor, requests: Segments) -> Tensor:
    """[T, E] float32 -> [R] float32, 0 for a request without used tokens."""
    # x - log_softmax(x) is the logsumexp in every column, by a kernel that is one call instead of eight. That of the largest x has it
    # exactly; in one of -1e9, as hides an expert, float32 has nothing left of it.
    logsumexp = router_logits.amax(dim=1, keepdim=True) - router_logits.log_softmax(dim=1).amax(dim=1, keepdim=True)
    return requests.mean(logsumexp.square()).squeeze(1)
