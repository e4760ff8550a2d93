"""Router logits -> scores. T tokens, E experts.

softmax    g = softmax(x): the gate of Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv 1701.06538), without its
           noise; also GShard, Switch and Mixtral
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def softmax(router_logits: Tensor) -> Tensor:
    """[T, E] float32 -> [T, E] probabilities."""
    return router_logits.softmax(dim=1)


#: value of `scoring_func` -> router_logits [T, E] -> scores [T, E]
SCORING: Mapping[str, Callable[[Tensor], Tensor]] = {"softmax": softmax}
