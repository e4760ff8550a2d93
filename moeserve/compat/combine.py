"""A routed layer of modules in this process. T tokens, H hidden size, K choices per token, R rows of one expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeserve.errors import ConfigError
from moeserve.gating import Routing


def run_experts(hidden_states: Tensor, routing: Routing, experts: Sequence[nn.Module]) -> Tensor:
    """[T, H] -> [T, H]: every expert on its rows [R, H], weighed and summed in float32, then in the dtype of the input.

    An expert may answer a tuple, of which the first counts. Gradients flow through rows and weights. Raises ConfigError when an expert
    answers another shape.
    """
    total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for index, expert in enumerate(experts):
        tokens, choices = (routing.kept & (routing.topk_ids == index)).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        rows = expert(hidden_states[tokens])
        rows = rows[0] if isinstance(rows, tuple) else rows
        if rows.shape != (len(tokens), hidden_states.shape[1]):
            raise ConfigError(
                f"expert {index} made {list(rows.shape)} of [{len(tokens)}, {hidden_states.shape[1]}]; allowed: the same shape"
            )
        total = total.index_add(0, tokens, rows.float() * routing.topk_weights[tokens, choices, None])
    return total.to(hidden_states.dtype)
