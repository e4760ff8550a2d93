"""What of an expert goes into panels, whatever kind of feed-forward expert it is.

O output and K input channels of a projection, H hidden size, I intermediate size, G = 2I or I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from moeserve.config import Activation
from moeserve.experts.codes import FP8, INT8, Code
from moeserve.experts.decoding import scales_of_channels
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.quantized import QuantizedFeedForward
from moeserve.experts.quantized_matrix import QuantizedMatrix
from moeserve.experts.scale_groups import ScaleGroups

_CODES: Final = {INT8.dtype: INT8, FP8.dtype: FP8}
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Packable:
    """What packing needs of an expert.

    gate_up_proj [G, H] and down_proj [H, I] in float, or as codes of one byte with scales [G] and [H] float32; biases [G] and [H], or
    None. rows_dtype: what rows are rounded to.
    """

    activation: Activation
    rows_dtype: torch.dtype
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_scales: torch.Tensor | None
    down_scales: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    @property
    def kind(self) -> tuple[Activation, torch.dtype, torch.dtype, int]:
        """What experts that are computed together have in common."""
        return self.activation, self.gate_up_proj.dtype, self.rows_dtype, self.down_proj.shape[0]


def packable(expert: object) -> Packable | None:
    """None for other kinds, those in groups of channels with scales of their own among them, and for what is on a GPU."""
    if isinstance(expert, FeedForward):
        dtype, weights = expert.gate_up_proj.dtype, (expert.gate_up_proj, expert.down_proj)
        if dtype not in _FLOATS or expert.gate_up_proj.device.type != "cpu":
            return None
        return Packable(expert.activation, dtype, *weights, None, None, expert.gate_up_bias, expert.down_bias)
    if not isinstance(expert, QuantizedFeedForward):
        return None
    matrices = (*expert.gate_up_proj, expert.down_proj)
    if any(matrix.code is not matrices[0].code or not _has_scales_of_channels(matrix) for matrix in matrices):
        return None
    codes = torch.cat([matrix.codes for matrix in expert.gate_up_proj]), expert.down_proj.codes
    scales = torch.cat([scales_of_channels(matrix) for matrix in expert.gate_up_proj]), scales_of_channels(expert.down_proj)
    return Packable(expert.activation, expert.dtype, *codes, *scales, expert.gate_up_bias, expert.down_bias)


def unpacked(packed: Packable) -> FeedForward | QuantizedFeedForward:
    """The expert that it is of."""
    if packed.gate_up_scales is None or packed.down_scales is None:
        return FeedForward(packed.activation, packed.gate_up_proj, packed.down_proj, packed.gate_up_bias, packed.down_bias)
    gate_up = _matrix(packed.gate_up_proj, packed.gate_up_scales)
    down = _matrix(packed.down_proj, packed.down_scales)
    return QuantizedFeedForward(packed.activation, (gate_up,), down, packed.gate_up_bias, packed.down_bias, packed.rows_dtype)


def _has_scales_of_channels(matrix: QuantizedMatrix) -> bool:
    is_coded = _CODES.get(matrix.code.dtype) is matrix.code and matrix.codes.device.type == "cpu"
    return is_coded and matrix.zeros is None and matrix.scales.shape[1:] == (1,)


def _matrix(codes: torch.Tensor, scales: torch.Tensor) -> QuantizedMatrix:
    code: Code = _CODES[codes.dtype]
    return QuantizedMatrix(code, codes, scales[:, None], codes.shape[1], ScaleGroups(1), ScaleGroups(max(1, codes.shape[1])))
