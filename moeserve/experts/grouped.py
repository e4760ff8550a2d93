"""The grouped pass itself: every busy expert once, its rows together; two ways to do it.

R rows, N pairs sorted by expert, n pairs of one expert, H hidden size, I intermediate size, E experts, G = 2I or I.
Both take row_index [N] int64, tokens_per_expert [E], pair_weights [N] float32 and add to out [R, H] float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moeserve.config import Activation
from moeserve.experts.activations import activate
from moeserve.experts.weights import ExpertWeights

# Few rows: W @ x^T keeps the large operand in its natural order, 1.4-1.8x faster than x @ W^T on CPUs up to about this many rows.
_NARROW_ROWS = 64


def expert_by_expert(
    weights: ExpertWeights,
    activation: Activation,
    hidden_states: torch.Tensor,
    row_index: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    pair_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One matmul per expert and projection: what CPU kernels and caches like best; any device, any dtype."""
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        if not count:
            continue
        rows = row_index[start : start + count]
        one = _narrow_expert if count <= _NARROW_ROWS else _wide_expert
        answer = one(weights, expert, activation, hidden_states.index_select(0, rows))
        out.index_add_(0, rows, answer.mul_(pair_weights[start : start + count, None]))
        start += count


def _wide_expert(weights: ExpertWeights, expert: int, activation: Activation, rows: torch.Tensor) -> torch.Tensor:
    """rows [n, H] -> [n, H] float32."""
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias[expert]
    down_bias = None if weights.down_bias is None else weights.down_bias[expert]
    hidden = activate(F.linear(rows, weights.gate_up_proj[expert], gate_up_bias), activation, dim=1)
    return F.linear(hidden, weights.down_proj[expert], down_bias).float()


def _narrow_expert(weights: ExpertWeights, expert: int, activation: Activation, rows: torch.Tensor) -> torch.Tensor:
    """As `_wide_expert`, computed as the transpose: [H, n] in, [H, n] out, turned back at the end."""
    # One row as a vector: the matrix-vector kernel reads bfloat16 weights almost twice as fast.
    columns, bias_shape = (rows[0], (-1,)) if len(rows) == 1 else (rows.t(), (-1, 1))
    projected = weights.gate_up_proj[expert] @ columns
    if weights.gate_up_bias is not None:
        projected += weights.gate_up_bias[expert].view(bias_shape)
    answer = weights.down_proj[expert] @ activate(projected, activation, dim=0)
    if weights.down_bias is not None:
        answer += weights.down_bias[expert].view(bias_shape)
    return torch.empty(rows.shape, dtype=torch.float32, device=rows.device).copy_(answer.t())


def ragged(
    weights: ExpertWeights,
    activation: Activation,
    hidden_states: torch.Tensor,
    row_index: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    pair_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One ragged matmul per projection and no return to the CPU in between: for CUDA, bfloat16."""
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    expert_of_pair = torch.repeat_interleave(tokens_per_expert, output_size=row_index.numel())
    projected = F.grouped_mm(hidden_states.index_select(0, row_index), weights.gate_up_proj.transpose(1, 2), offs=ends)
    if weights.gate_up_bias is not None:
        projected += weights.gate_up_bias[expert_of_pair]
    answer = F.grouped_mm(activate(projected, activation, dim=1), weights.down_proj.transpose(1, 2), offs=ends)
    if weights.down_bias is not None:
        answer += weights.down_bias[expert_of_pair]
    out.index_add_(0, row_index, answer.float().mul_(pair_weights[:, None]))
