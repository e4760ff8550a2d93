"""The routing that most models have, of one request, by one call of compiled code: the K best experts by softmax, and room for all.

T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.gating.capacity import CAPACITY_SCOPES
from moeserve.gating.routing import BatchRouting
from moeserve.gating.segments import Segments
from moeserve.gating.weights import PRE_DROP_EPS
from moeserve.kernels import TopK, route_top_k

#: of more logits, what is saved is less than what is computed
_FEW: Final = 4096


def plain_top_k(router_logits: Tensor, gating: GatingConfig, requests: Segments) -> BatchRouting | None:
    """Of router_logits [T, E] float32; None where the request, its gating or this machine needs the steps one by one."""
    if not 0 < router_logits.numel() <= _FEW or len(requests.sizes) != 1 or requests.used_token is not None or not _is_plain(gating):
        return None
    eps = PRE_DROP_EPS if gating.renormalize_eps is None else gating.renormalize_eps
    wanted = None if gating.renormalize == "none" else eps, gating.routed_scaling_factor
    found = route_top_k(router_logits, router_logits.softmax(dim=1), gating.top_k, *wanted)
    return None if found is None else _whole(found, gating, requests)


def _whole(found: TopK, gating: GatingConfig, requests: Segments) -> BatchRouting:
    """With every choice of every token."""
    chosen = torch.ones_like(found.topk_ids, dtype=torch.bool)
    return BatchRouting(
        request_sizes=requests.sizes,
        used_tokens=requests.sizes,
        topk_ids=found.topk_ids,
        topk_weights=found.topk_weights,
        chosen=chosen,
        kept=chosen,
        dropped_tokens=torch.zeros(requests.num_tokens, dtype=torch.bool),
        requested=found.requested,
        processed=found.requested,
        dropped=torch.zeros_like(found.requested),
        capacity=(None,),
        measure=partial(_losses, found, gating),
        groups=requests.divided(CAPACITY_SCOPES[gating.capacity_scope](requests.sizes, gating).sizes),
        is_choice_major=gating.drop_policy == "choice_major",
    )


def _losses(found: TopK, gating: GatingConfig, routing: BatchRouting) -> tuple[Tensor, Tensor]:
    """As aux_loss.py and z_loss.py have them."""
    num_experts = routing.requested.shape[1] if gating.aux_loss == "switch" else 0
    aux_loss, z_loss = found.balance * num_experts * gating.aux_loss_weight, found.logsumexp_squared * gating.z_loss_weight
    return torch.tensor([aux_loss], dtype=torch.float32), torch.tensor([z_loss], dtype=torch.float32)


def _is_plain(gating: GatingConfig) -> bool:
    return (
        gating.routing == "learned"
        and gating.scoring_func == "softmax"
        and gating.num_expert_groups is None
        and gating.renormalize != "post_drop"
        and gating.rank_by == "scores"
        and gating.logit_softcap is None
        and (gating.capacity_factor is None or not gating.drop_tokens)
        and gating.noise == "none"
        and gating.aux_loss in {"switch", "none"}
    )
