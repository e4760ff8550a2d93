"""The order in which the compiled code reads weights: csrc/kernels.h says which and why.

O output and K input channels of a matrix, P panels of 32 output channels, S input channels that lie side by side.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

#: output channels that lie together
PANEL: Final = 32
#: the numbers that csrc/kernels.h gives to types of weights
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_SIDE_BY_SIDE: Final = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 1, torch.int8: 2, torch.float8_e4m3fn: 2}
_BYTES: Final = {torch.float8_e4m3fn: torch.int8}


def padded(size: int) -> int:
    """The channels that `size` take in memory."""
    return -(-size // PANEL) * PANEL


def to_panels(matrix: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """[parts * O, K] -> [P, parts, K / S, 32, S], padded with zeros: panels of each part in turn. A view where nothing is padded."""
    outputs, inputs = matrix.shape[0] // parts, matrix.shape[1]
    matrix, side_by_side = matrix.view(parts, outputs, inputs), _SIDE_BY_SIDE[matrix.dtype]
    padding = 0, padded(inputs) - inputs, 0, padded(outputs) - outputs
    if any(padding):
        # Zeros are zeros in each of these types; torch cannot pad float8.
        matrix = F.pad(matrix.view(_BYTES.get(matrix.dtype, matrix.dtype)), padding).view(matrix.dtype)
    panels: torch.Tensor = matrix.unflatten(2, (-1, side_by_side)).unflatten(1, (-1, PANEL))
    return panels.permute(1, 0, 3, 2, 4)


def from_panels(panels: torch.Tensor, parts: int, outputs: int, inputs: int) -> torch.Tensor:
    """What `to_panels` made, flat -> [parts * O, K], a copy."""
    side_by_side = _SIDE_BY_SIDE[panels.dtype]
    split = panels.view(padded(outputs) // PANEL, parts, padded(inputs) // side_by_side, PANEL, side_by_side)
    matrix: torch.Tensor = split.permute(1, 0, 3, 2, 4).reshape(parts, padded(outputs), padded(inputs))
    return matrix[:, :outputs, :inputs].reshape(parts * outputs, inputs).contiguous()


def bias_to_panels(bias: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """[parts * O] -> [P * parts * 32] float32, in the order of `to_panels`."""
    outputs = len(bias) // parts
    padded_bias = F.pad(bias.float().view(parts, outputs), (0, padded(outputs) - outputs))
    return padded_bias.view(parts, -1, PANEL).transpose(0, 1).flatten()


def bias_from_panels(panels: torch.Tensor, parts: int, outputs: int) -> torch.Tensor:
    """What `bias_to_panels` made -> [parts * O] float32, a copy."""
    whole: torch.Tensor = panels.view(padded(outputs) // PANEL, parts, PANEL).transpose(0, 1).reshape(parts, -1)
    return whole[:, :outputs].flatten()
