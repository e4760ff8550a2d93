"""Feed-forward experts whose weights are held in few bits: quantized here, or as they were published.

n rows, H hidden size, I intermediate size, G = 2I or I; of one projection, O output and C input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from moeserve.config import Activation, Bits
from moeserve.experts.activations import activate
from moeserve.experts.codes import FP8, INT8, Code
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.quantized_matrix import QuantizedMatrix
from moeserve.experts.scale_groups import ScaleGroups

#: how quantized weights are stored, and the largest number that is used
_STORED: Final[Mapping[Bits, tuple[Code, float]]] = {"int8": (INT8, 127.0), "fp8": (FP8, 448.0)}


@dataclass(frozen=True, eq=False)
class QuantizedFeedForward:
    """A `FeedForward` with both projections in few bits; biases as they were. gate_up_proj: matrices one below the other, together [G, H].

    Rows, and what is between the projections, are bfloat16 where the weights were, otherwise float32: sums of 8-bit values are beyond
    float16, and CPUs decode to it more slowly than they compute in float32. Activations are computed in float32.
    """

    activation: Activation
    gate_up_proj: tuple[QuantizedMatrix, ...]
    down_proj: QuantizedMatrix
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        biases = (bias.nbytes for bias in (self.gate_up_bias, self.down_bias) if bias is not None)
        return sum(matrix.nbytes for matrix in (*self.gate_up_proj, self.down_proj)) + sum(biases)

    def to(self, device: torch.device) -> QuantizedFeedForward:
        gate_up_bias, down_bias = (None if bias is None else bias.to(device) for bias in (self.gate_up_bias, self.down_bias))
        gate_up_proj = tuple(matrix.to(device) for matrix in self.gate_up_proj)
        return QuantizedFeedForward(self.activation, gate_up_proj, self.down_proj.to(device), gate_up_bias, down_bias, self.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self.dtype)
        sizes = [matrix.shape[0] for matrix in self.gate_up_proj]
        projected = rows.new_empty(len(rows), sum(sizes), dtype=torch.float32)
        for matrix, part in zip(self.gate_up_proj, projected.split(sizes, dim=1), strict=True):
            matrix.project(rows, out=part)
        if self.gate_up_bias is not None:
            projected += self.gate_up_bias
        answer = self.down_proj.project(activate(projected, self.activation, dim=1).to(self.dtype))
        if self.down_bias is not None:
            answer += self.down_bias
        return answer


def quantize(expert: FeedForward, bits: Bits) -> QuantizedFeedForward:
    """The expert, or shard of one, with 8-bit weights; every shard has scales of its own."""
    return QuantizedFeedForward(
        expert.activation,
        (quantize_matrix(expert.gate_up_proj, bits),),
        quantize_matrix(expert.down_proj, bits),
        expert.gate_up_bias,
        expert.down_bias,
        computed_in(expert.down_proj.dtype),
    )


def quantize_matrix(weight: torch.Tensor, bits: Bits) -> QuantizedMatrix:
    """weight [O, C], any float dtype, finite -> symmetric, a float32 scale for each output channel.

    The largest weight of a channel becomes the largest number; channels of zeros stay.
    """
    code, largest = _STORED[bits]
    weight = weight.float()
    # A shard of a narrow expert may have no channels at all.
    scales = weight.abs().amax(dim=1, keepdim=True) / largest if weight.numel() else weight.new_zeros(len(weight), 1)
    # A channel of zeros, or of numbers so small that its scale would be none.
    scales = scales.clamp_(min=torch.finfo(torch.float32).tiny)
    values = (weight / scales).clamp_(-largest, largest)
    codes = (values.round_() if code is INT8 else values).to(code.dtype)
    return QuantizedMatrix(code, codes, scales, weight.shape[1], ScaleGroups(1), ScaleGroups(max(1, weight.shape[1])))


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type of rows beside weights in few bits, where the model's is `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
