"""The grouped pass itself: every busy expert once, its rows together; two ways to do it.

R rows, N pairs sorted by expert, n pairs of one expert, H hidden size, I intermediate size, E experts, G = 2I or I.
Both take row_index [N] int, tokens_per_expert [E], pair_weights [N] float32 and add to out [R, H] float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moeserve.config import Activation
from moeserve.experts.activations import activate
from moeserve.experts.weights import ExpertWeights, SingleExpert

# Few rows: W @ x^T keeps the large operand in its natural order, 1.4-1.8x faster than x @ W^T on CPUs up to about this many rows.
_NARROW_ROWS = 64


def expert_by_expert(
    weights: ExpertWeights,
    activation: Activation,
    hidden_states: torch.Tensor,
    row_index: torch.Tensor,
    tokens_per_expert: Sequence[int],
    pair_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One matmul per expert and projection: what CPU kernels and caches like best; any device, any dtype."""
    busy = [(expert, count) for expert, count in zip(weights.single, tokens_per_expert, strict=True) if count]
    counts = [count for _, count in busy]
    for (expert, count), index, scale in zip(busy, row_index.split(counts), pair_weights[:, None].split(counts), strict=True):
        rows = hidden_states if count == len(hidden_states) == 1 else hidden_states.index_select(0, index)
        one = _narrow_expert if count <= _NARROW_ROWS else _wide_expert
        out.index_add_(0, index, one(expert, activation, rows).mul_(scale))


def _wide_expert(expert: SingleExpert, activation: Activation, rows: torch.Tensor) -> torch.Tensor:
    """rows [n, H] -> a new [n, H] float32."""
    hidden = activate(F.linear(rows, expert.gate_up_proj, expert.gate_up_bias), activation, dim=1)
    return F.linear(hidden, expert.down_proj, expert.down_bias).float()


def _narrow_expert(expert: SingleExpert, activation: Activation, rows: torch.Tensor) -> torch.Tensor:
    """As `_wide_expert`, computed as the transpose: [H, n] in, [H, n] out, turned back at the end."""
    # One row as a vector: the matrix-vector kernel reads bfloat16 weights almost twice as fast.
    columns, bias_shape = (rows[0], (-1,)) if len(rows) == 1 else (rows.t(), (-1, 1))
    projected = expert.gate_up_proj @ columns
    if expert.gate_up_bias is not None:
        projected += expert.gate_up_bias.view(bias_shape)
    answer = expert.down_proj @ activate(projected, activation, dim=0)
    if expert.down_bias is not None:
        answer += expert.down_bias.view(bias_shape)
    return answer.t().to(torch.float32, memory_format=torch.contiguous_format).view(rows.shape)


def ragged(
    weights: ExpertWeights,
    activation: Activation,
    hidden_states: torch.Tensor,
    row_index: torch.Tensor,
    tokens_per_expert: Sequence[int],
    pair_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One ragged matmul per projection and no return to the CPU in between: for CUDA, bfloat16."""
    counts = torch.tensor(tokens_per_expert, device=out.device)
    ends = counts.cumsum(0).to(torch.int32)
    expert_of_pair = torch.repeat_interleave(counts, output_size=row_index.numel())
    projected = F.grouped_mm(hidden_states.index_select(0, row_index), weights.gate_up_proj.transpose(1, 2), offs=ends)
    if weights.gate_up_bias is not None:
        projected += weights.gate_up_bias[expert_of_pair]
    answer = F.grouped_mm(activate(projected, activation, dim=1), weights.down_proj.transpose(1, 2), offs=ends)
    if weights.down_bias is not None:
        answer += weights.down_bias[expert_of_pair]
    out.index_add_(0, row_index, answer.float().mul_(pair_weights[:, None]))
