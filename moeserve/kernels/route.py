"""What the gate does with the scores of experts, in one call each (csrc/route.c), where the compiled code was built.

T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_float, c_int64, c_void_p
from functools import cache
from typing import Final, NamedTuple

import torch

from moeserve.kernels.native import library
from moeserve.kernels.rows import is_plain

_TRIED: Final = 64


def select_top_k(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """ids [T, K] int64 and values [T, K] of the K <= E largest scores [T, E] float32, by descending score, then ascending id; no NaN.

    None where there is no compiled code, the scores are not in this process's memory or not float32, or their gradient is asked for.
    """
    code = library()
    if code is None or scores.requires_grad or not scores.is_cpu or scores.dtype != torch.float32:
        return None
    scores, (tokens, experts) = scores.contiguous(), scores.shape
    ids, values = scores.new_empty(tokens, top_k, dtype=torch.int64), scores.new_empty(tokens, top_k)
    code.select_top_k(tokens, experts, top_k, scores.data_ptr(), ids.data_ptr(), values.data_ptr())
    return ids, values


def normalize(scores: torch.Tensor, eps: float) -> torch.Tensor | None:
    """scores [T, K] / (their sum + eps), bit by bit as torch's operators do it; None where these have to."""
    code, (num_tokens, top_k) = library(), scores.shape
    if code is None or scores.requires_grad or not (is_plain(scores) and _adds_up_as_torch(top_k)):
        return None
    out = torch.empty(num_tokens, top_k, dtype=torch.float32)
    code.normalize(scores.data_ptr(), num_tokens, top_k, eps, out.data_ptr())
    return out


class RouteWork(Structure):
    """struct route of csrc/route.c."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_experts", "top_k")),
        *((name, c_void_p) for name in ("logits", "scores")),
        *((name, c_float) for name in ("eps", "factor")),
        *((name, c_void_p) for name in ("topk_ids", "topk_scores", "topk_weights", "requested")),
        *((name, c_double) for name in ("balance", "logsumexp_squared")),
    )


class TopK(NamedTuple):
    """topk_ids [T, K] int64; topk_weights [T, K] float32; requested [1, E] int64, how many tokens chose each expert.

    balance: the sum over experts of their share of the choices times their mean score; logsumexp_squared: the mean over tokens.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    requested: torch.Tensor
    balance: float
    logsumexp_squared: float


def route_top_k(logits: torch.Tensor, scores: torch.Tensor, top_k: int, eps: float | None, factor: float) -> TopK | None:
    """`select_top_k` of one request's scores [T, E], weights by `normalize` (None = the scores) times `factor`, counts, and means.

    logits [T, E], whose softmax the scores are; T and K are not 0. Bit by bit as the functions above. None where one of these has to do it
    in another way, or a logit is not finite.
    """
    code, (num_tokens, num_experts) = library(), scores.shape
    if code is None or scores.requires_grad or not (is_plain(logits) and is_plain(scores) and _adds_up_as_torch(top_k)):
        return None
    topk_ids, requested = scores.new_empty(num_tokens, top_k, dtype=torch.int64), scores.new_zeros(1, num_experts, dtype=torch.int64)
    topk_scores, topk_weights = scores.new_empty(2, num_tokens, top_k).unbind()
    made = topk_ids, topk_scores, topk_weights, requested
    sizes, wanted = (num_tokens, num_experts, top_k), (-1.0 if eps is None else eps, factor)
    work = RouteWork(*sizes, logits.data_ptr(), scores.data_ptr(), *wanted, *(tensor.data_ptr() for tensor in made))
    is_finite = code.route_top_k(byref(work)) == 0
    return TopK(topk_ids, topk_weights, requested, work.balance, work.logsumexp_squared) if is_finite else None


@cache
def _adds_up_as_torch(top_k: int) -> bool:
    """Whether both add up so many numbers in the same order, which differs between processors: tried once."""
    code, generator = library(), torch.Generator().manual_seed(top_k)
    scores = torch.rand(_TRIED, top_k, generator=generator, dtype=torch.float32)
    out = torch.empty_like(scores)
    if code is None:
        return False
    code.normalize(scores.data_ptr(), _TRIED, top_k, 0.0, out.data_ptr())
    return torch.equal(out, scores / scores.sum(dim=1, keepdim=True))
