"""Router logits -> scores. T tokens, E experts.

softmax        g = softmax(x): the gate of Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), without
               its noise; also GShard, Switch and Mixtral
softmax_topk   the same, but the weights of a token are a softmax over the K chosen logits alone: gpt-oss. It equals softmax with
               renormalize = "pre_drop" but for rounding, and for logits whose softmax vanishes
sigmoid        g = 1 / (1 + exp(-x)), each expert by itself: DeepSeek-V3 (arXiv 2412.19437, eq. 15), Llama 4
sqrt_softplus  g = sqrt(log(1 + exp(x))): DeepSeek-V4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.gating.elementwise import FAST, Elementwise


def softcapped(router_logits: Tensor, gating: GatingConfig, elementwise: Elementwise = FAST) -> Tensor:
    """[T, E] float32 -> the same within -c..c: the soft cap of Gemma 2 (arXiv 2408.00118, section 2), on logits of a router in Laguna."""
    cap = gating.logit_softcap
    return router_logits if cap is None else elementwise.tanh(router_logits / cap) * cap


def softmax(router_logits: Tensor, elementwise: Elementwise = FAST) -> Tensor:
    """[T, E] float32 -> [T, E] probabilities."""
    return router_logits.softmax(dim=1)


def sigmoid(router_logits: Tensor, elementwise: Elementwise = FAST) -> Tensor:
    """[T, E] float32 -> [T, E] in 0..1; a row need not add up to 1."""
    return elementwise.sigmoid(router_logits)


def sqrt_softplus(router_logits: Tensor, elementwise: Elementwise = FAST) -> Tensor:
    """[T, E] float32 -> [T, E], 0 or more."""
    return elementwise.softplus(router_logits).sqrt()


#: value of `scoring_func` -> router_logits [T, E] -> scores [T, E]
SCORING: Mapping[str, Callable[[Tensor, Elementwise], Tensor]] = {
    "softmax": softmax,
    "softmax_topk": softmax,
    "sigmoid": sigmoid,
    "sqrt_softplus": sqrt_softplus,
}

#: those whose scores of a token add up to 1
PROBABILITIES = frozenset({"softmax", "softmax_topk"})
