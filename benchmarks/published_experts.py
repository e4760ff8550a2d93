"""Experts in the formats that checkpoints are published in, rounded to nearest: calibrated checkpoints err less.

O output and C input channels, S x G scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from moeserve.experts import INT4, Code, FeedForward, QuantizedFeedForward, QuantizedMatrix, ScaleGroups, float_code, quantize

E4M3, FP4 = float_code(torch.float8_e4m3fn), float_code(torch.uint8)
_FP4_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Encode = Callable[[torch.Tensor], QuantizedMatrix]


def _blocked(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[O, C] -> [S, block rows, G, block columns]."""
    blocked: torch.Tensor = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    return blocked


def _largest(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[S, G]."""
    return _blocked(weight, block).abs().amax((1, 3))


def _divided(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return (_blocked(weight, block) / scales[:, None, :, None]).reshape(weight.shape)


def _power_of_two(largest: torch.Tensor, exponent: int) -> torch.Tensor:
    """As the Microscaling specification has it: that of the largest number, less that of the format's largest."""
    return torch.exp2(largest.log2().floor() - exponent)


def _matrix(code: Code, codes: torch.Tensor, scales: torch.Tensor, columns: int, block: tuple[int, int]) -> QuantizedMatrix:
    return QuantizedMatrix(code, codes, scales, columns, ScaleGroups(block[0]), ScaleGroups(block[1]))


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> QuantizedMatrix:
    scales = _largest(weight, block) / 448
    return _matrix(E4M3, _divided(weight, scales, block).to(E4M3.dtype), scales, weight.shape[1], block)


def mxfp8(weight: torch.Tensor) -> QuantizedMatrix:
    scales = _power_of_two(_largest(weight, (1, 32)), 8)
    codes = _divided(weight, scales, (1, 32)).clamp(-448, 448).to(E4M3.dtype)
    return _matrix(E4M3, codes, scales.to(torch.float8_e8m0fnu), weight.shape[1], (1, 32))


def _fp4(numbers: torch.Tensor) -> torch.Tensor:
    middles = (_FP4_NUMBERS[1:] + _FP4_NUMBERS[:-1]) / 2
    codes = torch.bucketize(numbers.abs(), middles).to(torch.uint8) | (numbers < 0).to(torch.uint8) << 3
    return FP4.packed(codes)


def mxfp4(weight: torch.Tensor) -> QuantizedMatrix:
    scales = _power_of_two(_largest(weight, (1, 32)), 2)
    return _matrix(FP4, _fp4(_divided(weight, scales, (1, 32))), scales.to(torch.float8_e8m0fnu), weight.shape[1], (1, 32))


def nvfp4(weight: torch.Tensor) -> QuantizedMatrix:
    factor = float(weight.abs().max()) / 6 / 448
    scales = (_largest(weight, (1, 16)) / 6 / factor).to(torch.float8_e4m3fn)
    codes = _fp4(_divided(weight, scales.float() * factor, (1, 16)))
    return QuantizedMatrix(FP4, codes, scales, weight.shape[1], ScaleGroups(1), ScaleGroups(16), factor=factor)


def int4(weight: torch.Tensor) -> QuantizedMatrix:
    """In groups of 128, symmetric."""
    scales = (_largest(weight, (1, 128)) / 7).bfloat16()
    codes = _divided(weight, scales.float(), (1, 128)).round().clamp(-8, 7).to(torch.int8)
    return _matrix(INT4, INT4.packed(codes), scales, weight.shape[1], (1, 128))


def int4_with_zeros(weight: torch.Tensor) -> QuantizedMatrix:
    """In groups of 128."""
    groups = weight.unflatten(1, (-1, 128))
    low, high = groups.aminmax(dim=2)
    scales = ((high - low) / 15).half()
    zeros = (-8 - low / scales.float()).round().clamp(-8, 7)
    codes = (groups / scales.float()[:, :, None] + zeros[:, :, None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    return QuantizedMatrix(INT4, INT4.packed(codes), scales, weight.shape[1], ScaleGroups(1), ScaleGroups(128), zeros.to(torch.int8))


ENCODERS: dict[str, Encode] = {
    "FP8 128 x 128": fp8_blocks,
    "MXFP8": mxfp8,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
    "INT4, groups of 128": int4,
    "INT4, groups of 128, zeros": int4_with_zeros,
}


def published(expert: FeedForward, name: str) -> QuantizedFeedForward:
    """The expert in one of ENCODERS, or in 8 bits by channel."""
    if name not in ENCODERS:
        return replace(quantize(expert, "fp8" if "FP8" in name else "int8"), dtype=torch.bfloat16)
    gate_up, down = (ENCODERS[name](weight.float()) for weight in (expert.gate_up_proj, expert.down_proj))
    return QuantizedFeedForward(expert.activation, (gate_up,), down, None, None, torch.bfloat16)


NAMES = ("FP8 per channel", "INT8 per channel", *ENCODERS)
