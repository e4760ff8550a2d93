"""Router z-loss: mean over tokens of logsumexp(x)^2, large when logits are: Zoph et al. 2022, ST-MoE (arXiv 2202.08906, eq. 5).

T tokens, E experts, R requests.
"""

from __future__ import annotations

from torch import Tensor

from moeserve.gating.segments import Segments


def z_loss(router_logits: Tensor, requests: Segments) -> Tensor:
    """[T, E] float32 -> [R] float32, 0 for a request without used tokens."""
    # x - log_softmax(x) is the logsumexp in every column, by a kernel that is one call instead of eight.
    log_softmax = router_logits.log_softmax(dim=1)
    first = slice(0, 1)
    logsumexp = router_logits[:, first] - log_softmax[:, first]
    return requests.mean(logsumexp.square()).squeeze(1)
