"""Load-balancing losses, one value per request. T tokens, E experts, K choices per token, R requests.

Telemetry when serving: reported with the answer, never part of it.

none       0
switch     E * sum_e f_e * P_e / K: Fedus et al. 2021 (arXiv 2101.03961, eq. 4), there for K = 1; after Shazeer et al. 2017.
           f_e = share of the request's tokens that chose expert e (before drops), P_e = their mean probability of e;
           1 when both are uniform
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from moeserve.gating.segments import Segments


def none(scores: Tensor, topk_ids: Tensor, requested: Tensor, requests: Segments) -> Tensor:
    return scores.new_zeros(len(requests.sizes))


def switch(scores: Tensor, topk_ids: Tensor, requested: Tensor, requests: Segments) -> Tensor:
    sum_of_products = (requested * requests.sum(scores)).sum(dim=1)
    return sum_of_products / requests.used_tokens.clamp(min=1).square() * (requests.num_experts / topk_ids.shape[1])


#: value of `aux_loss` -> (scores [T, E], topk_ids [T, K], requested [R, E], requests) -> [R] float32, 0 without used tokens
AUX_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {"none": none, "switch": switch}
