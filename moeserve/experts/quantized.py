"""Feed-forward experts whose weights are 8 bits wide: weight-only, symmetric, one float32 scale per output channel.

n rows, H hidden size, I intermediate size, G = 2I or I; of one projection, O output and C input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeserve.config import Activation, Quantization
from moeserve.experts.activations import activate
from moeserve.experts.feed_forward import FeedForward

#: how weights are stored, and the largest number that is used
_STORED: dict[Quantization, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
# Weights are decoded this many at a time, just before they are multiplied: what is decoded stays in the cache, and the allocator's heap.
_BLOCK = 2**21
# Up to this many rows the fused kernel is faster (1 row: 5x), beyond it decoding pays. It reads whole vectors, past the end of a row
# of weights that is no multiple of them.
_FUSED_ROWS, _FUSED_WIDTH = 8, 64


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A projection [O, C] = values * scales[:, None]: values int8 or float8_e4m3fn, scales [O] float32."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, quantization: Quantization) -> QuantizedMatrix:
        """weight [O, C], any float dtype, finite. The largest weight of a channel becomes the largest number; channels of zeros stay."""
        stored, largest = _STORED[quantization]
        weight = weight.float()
        # A shard of a narrow expert may have no channels at all.
        scales = weight.abs().amax(dim=1) / largest if weight.numel() else weight.new_zeros(len(weight))
        # A channel of zeros, or of numbers so small that its scale would be none.
        scales = scales.clamp_(min=torch.finfo(torch.float32).tiny)
        values = (weight / scales[:, None]).clamp_(-largest, largest)
        return cls((values.round_() if quantization == "int8" else values).to(stored), scales)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> QuantizedMatrix:
        return QuantizedMatrix(self.values.to(device), self.scales.to(device))

    def dequantized(self) -> torch.Tensor:
        """[O, C] float32."""
        return self.values.float() * self.scales[:, None]

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, C], bfloat16 or float32, n > 0 -> a new [n, O] float32.

        Values are exact in both, so the scales wait until the sums are there.
        """
        if self._is_fused(rows):
            return torch._weight_int8pack_mm(rows.contiguous(), self.values, rows.new_ones(len(self.values))).float().mul_(self.scales)
        # As in FeedForward: the large operand in its natural order, one row as a vector.
        columns = rows[0] if len(rows) == 1 else rows.t()
        sums = columns.new_empty(len(self.values), *columns.shape[1:])
        step = max(1, _BLOCK // max(1, rows.shape[1]))
        for first in range(0, len(sums), step):
            torch.matmul(_decoded(self.values[first : first + step], rows.dtype), columns, out=sums[first : first + step])
        return sums.float().view(len(sums), len(rows)).mul_(self.scales[:, None]).t()

    def _is_fused(self, rows: torch.Tensor) -> bool:
        # A private operator: nothing public multiplies bfloat16 rows by int8 weights, and decoding takes longer than a few rows.
        return (
            len(rows) <= _FUSED_ROWS
            and rows.dtype == torch.bfloat16
            and self.values.dtype == torch.int8
            and rows.device.type == "cpu"
            and rows.shape[1] > 0
            and rows.shape[1] % _FUSED_WIDTH == 0
            and hasattr(torch, "_weight_int8pack_mm")
        )


@dataclass(frozen=True, eq=False)
class QuantizedFeedForward:
    """A `FeedForward` with both projections quantized; biases as they were.

    Rows, and what is between the projections, are bfloat16 where the weights were, otherwise float32: sums of 8-bit values are beyond
    float16, and CPUs decode to it more slowly than they compute in float32. Activations are computed in float32.
    """

    activation: Activation
    gate_up_proj: QuantizedMatrix
    down_proj: QuantizedMatrix
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        biases = (bias.nbytes for bias in (self.gate_up_bias, self.down_bias) if bias is not None)
        return self.gate_up_proj.nbytes + self.down_proj.nbytes + sum(biases)

    def to(self, device: torch.device) -> QuantizedFeedForward:
        gate_up_bias, down_bias = (None if bias is None else bias.to(device) for bias in (self.gate_up_bias, self.down_bias))
        return QuantizedFeedForward(
            self.activation, self.gate_up_proj.to(device), self.down_proj.to(device), gate_up_bias, down_bias, self.dtype
        )

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        projected = self.gate_up_proj.project(rows.to(self.dtype))
        if self.gate_up_bias is not None:
            projected += self.gate_up_bias
        answer = self.down_proj.project(activate(projected, self.activation, dim=1).to(self.dtype))
        if self.down_bias is not None:
            answer += self.down_bias
        return answer.contiguous()


def quantize(expert: FeedForward, quantization: Quantization) -> QuantizedFeedForward:
    """The expert, or shard of one, with 8-bit weights; every shard has scales of its own."""
    return QuantizedFeedForward(
        expert.activation,
        QuantizedMatrix.of(expert.gate_up_proj, quantization),
        QuantizedMatrix.of(expert.down_proj, quantization),
        expert.gate_up_bias,
        expert.down_bias,
        torch.bfloat16 if expert.down_proj.dtype == torch.bfloat16 else torch.float32,
    )


def _decoded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 or float8_e4m3fn -> the same numbers in bfloat16 or float32."""
    if values.dtype == torch.int8 or values.is_cuda:
        return values.to(dtype)
    # CPUs cast float8 one by one. Faster: put sign, exponent and fraction where bfloat16 has them; then every number, those
    # without an implicit one too, is 2^(7 - 127) of what it was, the difference between the biases of the two exponents.
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(~0x7800)
    return bits.view(torch.bfloat16).to(dtype).mul_(2.0**120)
