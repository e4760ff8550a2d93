"""The call as an operator of torch, which torch.compile and CUDA graphs leave alone.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from vllm.forward_context import get_forward_context

from moeserve.engines.vllm.calls import ServiceCalls, used_rows
from moeserve.observe.stats import LayerInfo

_NO_CHOICE: Final = -1


@dataclass(frozen=True)
class CalledLayer:
    """A layer of the service. part: which of the equal parts of a batch this rank has; 0 where it has all of it."""

    calls: ServiceCalls
    served: LayerInfo
    part: int = 0

    def forward(self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Zeros, without a call, for what is no request: dummy batches, padding, the batches that vLLM measures its memory with."""
        context = get_forward_context()
        used = None if context.is_padding is None else used_rows(context.is_padding, self.part, len(hidden_states))
        if context.attn_metadata is None or not len(hidden_states) or (used is not None and not used.any()):
            return torch.zeros_like(hidden_states)
        # Routers give experts that do not compute an id of another and no weight.
        topk_ids = topk_ids.masked_fill(topk_weights == 0, _NO_CHOICE)
        return self.calls.forward(self.served, hidden_states, used, topk_ids, topk_weights)


@torch.library.custom_op(
    "moeserve::routed_experts",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor",
)
def routed_experts(hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    """[T, H], [T, K], [T, K] through the experts of the layer that vLLM calls `layer_name` -> [T, H], a new tensor.

    Ranks that do not call answer zeros.
    """
    layers: Mapping[str, Any] = get_forward_context().no_compile_layers
    remote: CalledLayer | None = layers[layer_name].routed_experts.quant_method.remote
    return torch.zeros_like(hidden_states) if remote is None else remote.forward(hidden_states, topk_weights, topk_ids)


@routed_experts.register_fake
def _(hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(hidden_states)
