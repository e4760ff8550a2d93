"""Scores of the chosen experts -> combine weights. T tokens, K choices per token.

none       w_k = g_k, the raw probability: Switch, ColossalAI
pre_drop   w_k = g_k / (sum over the K choices + eps): GShard g1 / (g1 + g2) (arXiv 2006.16668), Mixtral, Qwen `norm_topk_prob`;
           DeepSeek-V3 has eps = 1e-20, which is the default: it only shows where all scores vanish
post_drop  w_k = g_k / max(sum over the choices that were not dropped, float32's eps): DeepSpeed top-2 and top-k; a lone survivor
           gets 1. With an eps of its own the sum plus eps instead: MindFormers, eps = 1e-9
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeserve.kernels import normalize

EPS = torch.finfo(torch.float32).eps
PRE_DROP_EPS = 1e-20


def none(topk_scores: Tensor, kept: Tensor | None, eps: float | None) -> Tensor:
    return _survivors(topk_scores, kept)


def pre_drop(topk_scores: Tensor, kept: Tensor | None, eps: float | None) -> Tensor:
    eps = PRE_DROP_EPS if eps is None else eps
    shares = normalize(topk_scores, eps)
    return _survivors(topk_scores / (topk_scores.sum(dim=1, keepdim=True) + eps) if shares is None else shares, kept)


def post_drop(topk_scores: Tensor, kept: Tensor | None, eps: float | None) -> Tensor:
    survivors = _survivors(topk_scores, kept)
    total = survivors.sum(dim=1, keepdim=True)
    return survivors / (total.clamp(min=EPS) if eps is None else total + eps)


def _survivors(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept


#: value of `renormalize` -> (topk_scores [T, K], kept [T, K] bool or None = all, renormalize_eps) -> weights [T, K], 0 where not kept
RENORMALIZE: Mapping[str, Callable[[Tensor, Tensor | None, float | None], Tensor]] = {
    "none": none,
    "pre_drop": pre_drop,
    "post_drop": post_drop,
}


def keep_total(topk_weights: Tensor, kept: Tensor) -> Tensor:
    """Weights the caller gave, 0 where not kept; survivors take over what was dropped of their token.

    topk_weights [T, K] float32; kept [T, K] bool. A token's weights still add up to what the caller gave it, whatever the scale.
    Survivors that add up to no more than eps stay as they are.
    """
    survivors = topk_weights * kept
    total = survivors.sum(dim=1, keepdim=True)
    share = topk_weights.sum(dim=1, keepdim=True) / total
    return torch.where(total > EPS, survivors * share, survivors)
