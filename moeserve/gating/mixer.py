"""How the answer of a shared expert joins that of the chosen ones. T tokens, H hidden size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from moeserve.config import Mixing
from moeserve.gating.elementwise import FAST, INVARIANT
from moeserve.kernels import InvariantLinear


@dataclass(frozen=True, eq=False)
class Mixer:
    """routed * chosen(x) + shared * shared_expert(x), in float32.

    add       1 and 1                                        DeepSeek-MoE (Dai et al. 2024, arXiv 2401.06066)
    average   1/2 and 1/2                                    Cohere2 MoE
    sigmoid   1 and sigmoid(w x), weight [1, H]              Qwen2-MoE
    residual  softmax(W x + b), weight [2, H], bias [2]      DeepSpeed's residual MoE (Rajbhandari et al. 2022, arXiv 2201.05596)

    is_invariant: what a token gets is bitwise the same whatever other tokens there are.
    """

    mixing: Mixing
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    is_invariant: bool = False

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """[T, H] -> what multiplies the gate's weights, [T] float32 or None for 1, and the weight of the shared expert, [T] float32."""
        if self.mixing == "average":
            half = torch.full((len(hidden_states),), 0.5, dtype=torch.float32)
            return half, half
        if self.weight is None:
            return None, torch.ones(len(hidden_states), dtype=torch.float32)
        logits = self._logits(hidden_states.float())
        if self.mixing == "sigmoid":
            return None, (INVARIANT if self.is_invariant else FAST).sigmoid(logits).squeeze(1)
        routed, shared = logits.softmax(dim=1).unbind(dim=1)
        return routed.contiguous(), shared.contiguous()

    @cached_property
    def _logits(self) -> Callable[[torch.Tensor], torch.Tensor]:
        assert self.weight is not None, "mixing = add has no logits"
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        return InvariantLinear(weight, bias) if self.is_invariant else partial(F.linear, weight=weight, bias=bias)
