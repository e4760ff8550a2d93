"""The gate, from router logits to routing: scores, selection, capacity, weights, losses.

T tokens, H hidden size, E experts, K choices per token, R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moeserve.api import surroundings
from moeserve.api.tensors import is_finite, require_data, without_unused
from moeserve.config import GatingConfig
from moeserve.errors import ConfigError, InvalidRequest, number_of
from moeserve.gating.aux_loss import AUX_LOSSES
from moeserve.gating.capacity import CAPACITY_SCOPES, capacity
from moeserve.gating.chance import Chance
from moeserve.gating.drop import DROP_POLICIES, keep
from moeserve.gating.elementwise import FAST, Elementwise
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.noise import shake_logits
from moeserve.gating.plain import plain_top_k
from moeserve.gating.routing import BatchRouting, Routing
from moeserve.gating.routings import routing_of
from moeserve.gating.scoring import PROBABILITIES, softcapped
from moeserve.gating.segments import Segments
from moeserve.gating.weights import PRE_DROP_EPS, RENORMALIZE, keep_total
from moeserve.gating.z_loss import z_loss


@surroundings.put_aside()
def route(
    router_logits: Tensor,
    gating: GatingConfig,
    used_token: Tensor | None = None,
    token_ids: Tensor | None = None,
    hidden_states: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    score_correction_bias: Tensor | None = None,
    centroids: Tensor | None = None,
    token_experts: Tensor | None = None,
) -> Routing:
    """Routes the tokens of one request.

    router_logits          [T, E] of any real dtype, computed on in float32
    used_token             [T]    bool, None = every token is used; rows of the others may hold anything
    token_ids              [T]    int, 0..2^32-1; for routing = "hash" and "token_table"
    hidden_states          [T, H] float; for routing = "similarity"
    generator              random numbers come from it instead of `gating.seed`
    score_correction_bias  [E]    float, added to the scores for selection only
    centroids              [E, H] float; for routing = "similarity"
    token_experts          [V, K] int, the experts of each token id; for routing = "token_table"

    Jitter acts in front of the gate, hence not here: see Router. Raises ConfigError when `gating` does not fit the layer, InvalidRequest
    when a tensor is missing or has the wrong shape, or a logit of a used token is NaN or Inf.
    """
    if not isinstance(gating, GatingConfig):
        raise ConfigError(f"gating is {gating!r}; allowed: a GatingConfig")
    _check_tensors(router_logits, used_token, token_ids, hidden_states)
    num_tokens, num_experts = router_logits.shape
    check_layer_tensors(num_experts, score_correction_bias, centroids)
    check_token_experts(num_experts, gating, token_experts)
    return route_requests(
        router_logits,
        gating,
        [num_tokens],
        used_token,
        Chance([num_tokens], router_logits.device, gating.seed, generator),
        token_ids=None if token_ids is None else without_unused(token_ids.long(), used_token),
        hidden_states=None if hidden_states is None else without_unused(hidden_states, used_token),
        score_correction_bias=score_correction_bias,
        centroids=centroids,
        token_experts=token_experts,
    ).request(0)


def _check_tensors(router_logits: Tensor, used_token: Tensor | None, token_ids: Tensor | None, hidden_states: Tensor | None) -> None:
    """Raises InvalidRequest unless they are of the same tokens."""
    given = {"router_logits": router_logits, "used_token": used_token, "token_ids": token_ids, "hidden_states": hidden_states}
    for name, tensor in given.items():
        if tensor is not None:
            require_data(tensor, name)
            if tensor.is_complex():
                raise InvalidRequest(f"{name} is {tensor.dtype}; allowed: real numbers", name)
    if router_logits.dim() != 2:
        raise InvalidRequest(f"router_logits must be [tokens, experts], got {list(router_logits.shape)}", "router_logits")
    num_tokens = len(router_logits)
    if used_token is not None and (used_token.dtype != torch.bool or list(used_token.shape) != [num_tokens]):
        raise InvalidRequest(
            f"used_token must be bool of shape [{num_tokens}], got {used_token.dtype} {list(used_token.shape)}", "used_token"
        )
    if token_ids is not None and (token_ids.is_floating_point() or list(token_ids.shape) != [num_tokens]):
        raise InvalidRequest(f"token_ids must be int of shape [{num_tokens}], got {token_ids.dtype} {list(token_ids.shape)}", "token_ids")
    if hidden_states is not None and (hidden_states.dim() != 2 or hidden_states.shape[0] != num_tokens):
        raise InvalidRequest(f"hidden_states must be [{num_tokens}, hidden size], got {list(hidden_states.shape)}", "hidden_states")


def route_requests(
    router_logits: Tensor,
    gating: GatingConfig,
    request_sizes: Sequence[int],
    used_token: Tensor | None,
    chance: Chance | None = None,
    *,
    token_ids: Tensor | None = None,
    hidden_states: Tensor | None = None,
    score_correction_bias: Tensor | None = None,
    centroids: Tensor | None = None,
    elementwise: Elementwise = FAST,
    token_experts: Tensor | None = None,
) -> BatchRouting:
    """Routes several requests laid end to end; `request_sizes` [R] in tokens, some may be 0. Everything else as in `route`."""
    num_experts = router_logits.shape[1]
    if gating.top_k > num_experts:
        raise ConfigError(f"top_k is {gating.top_k} but the layer has {number_of(num_experts, 'expert')}")
    requests = Segments(request_sizes, used_token, num_experts, router_logits.device)
    assert requests.num_tokens == router_logits.shape[0]
    router_logits = router_logits.float()
    if score_correction_bias is None and (plain := plain_top_k(router_logits, gating, requests)) is not None:
        return plain
    chance = chance or Chance(requests.sizes, router_logits.device, gating.seed, None)
    # Noise may be too large for float32, too.
    router_logits = _finite(shake_logits(router_logits, gating, chance), requests)
    gate = GateInput(
        gating,
        softcapped(router_logits, gating, elementwise),
        requests,
        chance,
        None if token_ids is None else token_ids.long(),
        None if hidden_states is None else hidden_states.float(),
        None if score_correction_bias is None else score_correction_bias.float(),
        None if centroids is None else centroids.float(),
        elementwise,
        None if token_experts is None else token_experts.long(),
    )
    selection = routing_of(gating)(gate)
    admitted = _admit(selection, gating, requests, chance)
    is_whole = admitted.kept is admitted.chosen and selection.chosen is None and requests.used_token is None
    kept = None if is_whole else admitted.kept
    weights = RENORMALIZE[gating.renormalize](selection.topk_scores, kept, gating.renormalize_eps)
    return replace(
        admitted,
        topk_weights=_scaled(weights, gating.routed_scaling_factor),
        measure=partial(_losses, selection.scores, gate.router_logits, gating, requests),
    )


def _losses(
    scores: Tensor, router_logits: Tensor, gating: GatingConfig, requests: Segments, routing: BatchRouting
) -> tuple[Tensor, Tensor]:
    aux_loss = AUX_LOSSES[gating.aux_loss](_probabilities(scores, gating), routing, requests)
    return _scaled(aux_loss, gating.aux_loss_weight), _scaled(z_loss(router_logits, requests), gating.z_loss_weight)


def _no_losses(routing: BatchRouting) -> tuple[Tensor, Tensor]:
    nothing = routing.topk_weights.new_zeros(len(routing.request_sizes))
    return nothing, nothing


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def apply_choices(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    gating: GatingConfig,
    request_sizes: Sequence[int],
    used_token: Tensor | None,
) -> BatchRouting:
    """Capacity, drops and counts for choices the caller has made; the losses are 0.

    topk_ids [T, K] int, distinct within a token and in 0..E-1, or -1 = no choice, which is neither requested nor dropped;
    topk_weights [T, K] float, finite, used as given. Rows of unused tokens, and weights of no choice, may hold anything. Only with
    `renormalize = "post_drop"` the survivors of a token that lost a choice are scaled up to the sum the caller gave the token.
    """
    requests = Segments(request_sizes, used_token, num_experts, topk_ids.device)
    assert topk_ids.shape == topk_weights.shape
    assert topk_ids.shape[0] == requests.num_tokens
    topk_ids, topk_weights = topk_ids.long(), topk_weights.float()
    experts, chosen = topk_ids, None
    if used_token is not None or (topk_ids < 0).any():
        chosen = requests.chosen(topk_ids) & (topk_ids >= 0)
        experts, topk_weights = topk_ids.masked_fill(~chosen, 0), topk_weights.masked_fill(~chosen, 0.0)
    chance = Chance(requests.sizes, topk_ids.device, gating.seed, None)
    admitted = _admit(Selection(topk_weights, experts, topk_weights, chosen=chosen), gating, requests, chance)
    if gating.renormalize == "post_drop":
        admitted = replace(admitted, topk_weights=keep_total(topk_weights, admitted.kept))
    if chosen is None:
        return admitted
    return replace(admitted, topk_ids=topk_ids, dropped_tokens=(admitted.kept != chosen).any(dim=1))


def check_layer_tensors(num_experts: int, score_correction_bias: Tensor | None, centroids: Tensor | None) -> None:
    """Raises ConfigError unless what a layer owns fits its experts."""
    if score_correction_bias is not None and list(score_correction_bias.shape) != [num_experts]:
        raise ConfigError(f"score_correction_bias must be [{num_experts}], one value per expert, got {list(score_correction_bias.shape)}")
    if score_correction_bias is not None and score_correction_bias.isnan().any():
        raise ConfigError("score_correction_bias has NaN; allowed: numbers, by which experts can be compared")
    if centroids is not None and (centroids.dim() != 2 or centroids.shape[0] != num_experts):
        raise ConfigError(f"centroids must be [{num_experts}, hidden size], one row per expert, got {list(centroids.shape)}")
    if centroids is not None and not is_finite(centroids):
        raise ConfigError("centroids have NaN or Inf; allowed: finite numbers")


def check_token_experts(num_experts: int, gating: GatingConfig, token_experts: Tensor | None) -> None:
    """Raises ConfigError unless the table of token ids has `top_k` distinct experts for each."""
    if token_experts is None:
        return
    if token_experts.dim() != 2 or token_experts.shape[1] != gating.top_k or token_experts.is_floating_point():
        shape = list(token_experts.shape)
        raise ConfigError(f"token_experts must be whole numbers [token ids, top_k = {gating.top_k}], got {token_experts.dtype} {shape}")
    ordered = token_experts.sort(dim=1).values
    bad = ((ordered[:, 1:] == ordered[:, :-1]).any(dim=1) | (ordered < 0).any(dim=1) | (ordered >= num_experts).any(dim=1)).nonzero()
    if len(bad):
        token = int(bad[0])
        raise ConfigError(
            f"token_experts of token id {token} are {token_experts[token].tolist()}; allowed: distinct experts in 0..{num_experts - 1}"
        )


def _admit(selection: Selection, gating: GatingConfig, requests: Segments, chance: Chance) -> BatchRouting:
    """What the experts have room for, with the scores as weights and without losses."""
    topk_ids, topk_scores = selection.topk_ids, selection.topk_scores
    limit = capacity(gating, requests.sizes, requests.num_experts, topk_ids.shape[1])
    groups = requests.divided(CAPACITY_SCOPES[gating.capacity_scope](requests.sizes, gating).sizes)
    kept = chosen = requests.chosen(topk_ids) if selection.chosen is None else selection.chosen
    is_everything_chosen = selection.chosen is None and requests.used_token is None
    processed = requested = requests.count(topk_ids, None if is_everything_chosen else chosen)
    if selection.kept is not None:
        kept = selection.kept
        processed = requests.count(topk_ids, kept)
    elif limit is not None and limit.can_overflow:
        kept = keep(topk_ids, chosen, DROP_POLICIES[gating.drop_policy](topk_scores, chance), groups, limit.room)
        processed = requests.count(topk_ids, kept)
    return BatchRouting(
        request_sizes=requests.sizes,
        used_tokens=requests.sizes if requests.used_token is None else requests.used_tokens.tolist(),
        topk_ids=topk_ids,
        topk_weights=topk_scores if kept is chosen and is_everything_chosen else topk_scores * kept,
        chosen=chosen,
        kept=kept,
        dropped_tokens=_dropped_tokens(selection, kept, chosen, requests),
        requested=requested,
        processed=processed,
        dropped=torch.zeros_like(requested) if processed is requested else requested - processed,
        capacity=(None,) * len(requests.sizes) if limit is None else limit.of_request,
        measure=_no_losses,
        groups=groups,
        is_choice_major=gating.drop_policy == "choice_major" or gating.routing == "mindformers",
    )


def _dropped_tokens(selection: Selection, kept: Tensor, chosen: Tensor, requests: Segments) -> Tensor:
    """[T] bool: tokens that lost a choice; where experts choose, those that none took."""
    if selection.chosen is not None:
        return _left_out(kept, requests)
    return kept.new_zeros(len(kept)) if kept is chosen else (kept != chosen).any(dim=1)


def _left_out(kept: Tensor, requests: Segments) -> Tensor:
    """[T] bool: used tokens that no expert took."""
    taken = kept.any(dim=1)
    return ~taken if requests.used_token is None else requests.used_token & ~taken


def _probabilities(scores: Tensor, gating: GatingConfig) -> Tensor:
    """[T, E] float32, rows of sum 1: what losses take scores for. DeepSeek-V3 (arXiv 2412.19437, eq. 19) does it to its sigmoids too."""
    if gating.scoring_func in PROBABILITIES or gating.aux_loss == "none":
        return scores
    return scores * (scores.sum(dim=1, keepdim=True) + PRE_DROP_EPS).reciprocal()


def _finite(router_logits: Tensor, requests: Segments) -> Tensor:
    """The same logits, 0 in rows of unused tokens that are not finite: those may hold anything. Raises InvalidRequest for used ones."""
    if is_finite(router_logits):
        return router_logits
    bad = ~router_logits.isfinite()
    if requests.used_token is not None:
        unused = bad.any(dim=1) & ~requests.used_token
        router_logits, bad = without_unused(router_logits, ~unused), bad & requests.used_token[:, None]
    if not bad.any():
        return router_logits
    token, expert = bad.nonzero()[0].tolist()
    request = int(requests.ids[token])
    of_request = f" of request {request}" if len(requests.sizes) > 1 else ""
    raise InvalidRequest(
        f"router_logits of token {token - sum(requests.sizes[:request])}{of_request} is not finite (NaN or Inf): "
        f"that of expert {expert} is {router_logits[token, expert].item()}",
        "router_logits",
    )
