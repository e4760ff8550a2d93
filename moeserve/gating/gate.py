"""The gate, from router logits to routing: scores, selection, capacity, weights, losses.

T tokens, E experts, K choices per token, R requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.gating.aux_loss import AUX_LOSSES
from moeserve.gating.capacity import capacity
from moeserve.gating.drop import DROP_POLICIES, keep
from moeserve.gating.routing import BatchRouting, Routing
from moeserve.gating.scoring import SCORING
from moeserve.gating.segments import Segments
from moeserve.gating.selection import select_top_k
from moeserve.gating.weights import RENORMALIZE, keep_total
from moeserve.gating.z_loss import z_loss


def route(router_logits: Tensor, gating: GatingConfig, used_token: Tensor | None = None) -> Routing:
    """Routes the tokens of one request.

    router_logits [T, E] of any real dtype, computed on in float32; used_token [T] bool, None = every token is used.
    Raises ConfigError when `gating.top_k` exceeds E, InvalidRequest when a tensor has the wrong shape or a logit is NaN or Inf.
    """
    if router_logits.dim() != 2:
        raise InvalidRequest(f"router_logits must be [tokens, experts], got {list(router_logits.shape)}", "router_logits")
    num_tokens = router_logits.shape[0]
    if used_token is not None and (used_token.dtype != torch.bool or list(used_token.shape) != [num_tokens]):
        raise InvalidRequest(
            f"used_token must be bool of shape [{num_tokens}], got {used_token.dtype} {list(used_token.shape)}", "used_token"
        )
    return route_requests(router_logits, gating, [num_tokens], used_token).request(0)


def route_requests(router_logits: Tensor, gating: GatingConfig, request_sizes: Sequence[int], used_token: Tensor | None) -> BatchRouting:
    """Routes several requests laid end to end; `request_sizes` [R] in tokens, some may be 0. Everything else as in `route`."""
    num_experts, top_k = router_logits.shape[1], gating.top_k
    if top_k > num_experts:
        raise ConfigError(f"top_k is {top_k} but the layer has {num_experts} experts")
    router_logits = router_logits.float()
    requests = Segments(request_sizes, used_token, num_experts, router_logits.device)
    assert requests.num_tokens == router_logits.shape[0]
    _require_finite(router_logits, requests)

    scores = SCORING[gating.scoring_func](router_logits)
    topk_ids = select_top_k(scores, top_k)
    topk_scores = scores.gather(1, topk_ids)
    admitted = _admit(topk_ids, topk_scores, gating, requests)
    return replace(
        admitted,
        topk_weights=RENORMALIZE[gating.renormalize](topk_scores, admitted.kept) * gating.routed_scaling_factor,
        aux_loss=AUX_LOSSES[gating.aux_loss](scores, topk_ids, admitted.requested, requests) * gating.aux_loss_weight,
        z_loss=z_loss(router_logits, requests) * gating.z_loss_weight,
    )


def apply_choices(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    gating: GatingConfig,
    request_sizes: Sequence[int],
    used_token: Tensor | None,
) -> BatchRouting:
    """Capacity, drops and counts for choices the caller has made; the losses are 0.

    topk_ids [T, K] int, distinct within a token and in 0..E-1; topk_weights [T, K] float, finite, used as given. Only with
    `renormalize = "post_drop"` the survivors of a token that lost a choice are scaled up to the sum the caller gave the token.
    """
    requests = Segments(request_sizes, used_token, num_experts, topk_ids.device)
    assert topk_ids.shape == topk_weights.shape
    assert topk_ids.shape[0] == requests.num_tokens
    topk_ids, topk_weights = topk_ids.long(), topk_weights.float()
    admitted = _admit(topk_ids, topk_weights, gating, requests)
    if gating.renormalize == "post_drop":
        return replace(admitted, topk_weights=keep_total(topk_weights, admitted.kept))
    return admitted


def _admit(topk_ids: Tensor, topk_scores: Tensor, gating: GatingConfig, requests: Segments) -> BatchRouting:
    """What the experts have room for, with the scores as weights and without losses."""
    limit = capacity(gating, requests.sizes, requests.num_experts, topk_ids.shape[1])
    kept = chosen = requests.chosen(topk_ids)
    processed = requested = requests.count(topk_ids, chosen)
    if limit is not None and limit.can_overflow:
        groups = Segments(limit.group_sizes, requests.used_token, requests.num_experts, topk_ids.device)
        kept = keep(topk_ids, chosen, DROP_POLICIES[gating.drop_policy](topk_scores), groups, limit.limits)
        processed = requests.count(topk_ids, kept)
    no_loss = topk_scores.new_zeros(len(requests.sizes))
    return BatchRouting(
        request_sizes=requests.sizes,
        used_tokens=requests.used_tokens,
        topk_ids=topk_ids,
        topk_weights=topk_scores * kept,
        kept=kept,
        dropped_tokens=(kept != chosen).any(dim=1),
        requested=requested,
        processed=processed,
        dropped=requested - processed,
        capacity=(None,) * len(requests.sizes) if limit is None else limit.of_request,
        aux_loss=no_loss,
        z_loss=no_loss,
    )


def _require_finite(router_logits: Tensor, requests: Segments) -> None:
    # One NaN or Inf makes the sum one; so may finite logits that are too large to add up, hence the second look.
    if math.isfinite(router_logits.sum().item()):
        return
    bad = ~router_logits.isfinite().all(dim=1)
    if not bad.any():
        return
    token = int(bad.nonzero()[0])
    request = int(requests.ids[token])
    of_request = f" of request {request}" if len(requests.sizes) > 1 else ""
    raise InvalidRequest(
        f"router_logits of token {token - sum(requests.sizes[:request])}{of_request} is not finite (NaN or Inf)", "router_logits"
    )
