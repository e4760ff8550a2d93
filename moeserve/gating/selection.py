"""Scores -> the experts of each token. T tokens, E experts, K choices per token.

Top-k selection is that of Shazeer et al. 2017 (arXiv 1701.06538): e_1 .. e_K = the K largest of s[t, :]. Switch (K = 1) and
GShard (K = 2) are special cases. Among equal scores the lowest expert id comes first.
"""

from __future__ import annotations

from torch import Tensor

from moeserve import kernels


def select_top_k(scores: Tensor, top_k: int) -> Tensor:
    """[T, E] float32 -> topk_ids [T, K] int64, by descending score, then ascending expert id; K <= E."""
    found = kernels.select_top_k(scores, top_k)
    return _select_top_k(scores, top_k) if found is None else found[0]


def largest(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ids of `select_top_k`, and the scores [T, K] of these experts."""
    found = kernels.select_top_k(scores, top_k)
    if found is not None:
        return found
    topk_ids = _select_top_k(scores, top_k)
    return topk_ids, scores.gather(1, topk_ids)


def _select_top_k(scores: Tensor, top_k: int) -> Tensor:
    """By torch's operators."""
    # topk leaves the order of equals open. One value beyond the K-th shows whether any are equal, which is rare.
    num_candidates = min(top_k + 1, scores.shape[1])
    values, ids = scores.topk(num_candidates, dim=1)
    is_next_equal = values[:, 1:] == values[:, :-1]
    if is_next_equal.any():
        tied = is_next_equal.any(dim=1)
        ids[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :num_candidates]
    return ids[:, :top_k].contiguous()
