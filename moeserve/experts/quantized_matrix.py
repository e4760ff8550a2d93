"""A projection held in few bits, and multiplied without being decoded as a whole.

n rows, O output and C input channels, S x G scales, r output channels of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F

from moeserve.experts.codes import FP8, Code
from moeserve.experts.decoding import Decoder, decoder_of, scales_in_float32
from moeserve.experts.scale_groups import ScaleGroups

# Few rows wait for numbers to be decoded: they stay in float32, which is a step less, and nothing is rounded. For many, tiles of so many
# numbers are decoded just before they are multiplied: enough for a matmul to be worth its call.
_FEW_ROWS: Final = 8
_TILE: Final = 2**20
_ROWS_AT_ONCE: Final = 64


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """[O, C], of which number (o, c) = (number of codes[o, c] - zeros[s, g]) * scales[s, g] * factor.

    codes [O, bytes of C]; scales [S, G] of any float type; zeros [S, G] int8 or None; s is the group of o in `row_groups`, g that of c in
    `column_groups`, which is [C] int32 where neighbors are in different groups.
    """

    code: Code
    codes: torch.Tensor
    scales: torch.Tensor
    columns: int
    row_groups: ScaleGroups
    column_groups: ScaleGroups | torch.Tensor
    zeros: torch.Tensor | None = None
    factor: float = 1.0

    def is_finite(self) -> bool:
        """Whether every number is, in float32."""
        scales = scales_in_float32(self, 1.0)
        are_numbers = scales.isfinite().all() and (self.scales.dtype != FP8.dtype or FP8.are_finite(self.scales))
        if not (are_numbers and self.code.are_finite(self.codes)):
            return False
        offset = 0 if self.zeros is None or not self.zeros.numel() else int(self.zeros.to(torch.int16).abs().max())
        largest = float(scales.abs().max()) * (self.code.largest + offset) if scales.numel() else 0.0
        return largest <= torch.finfo(torch.float32).max or bool(self.dequantized().isfinite().all())

    @property
    def shape(self) -> tuple[int, int]:
        """O and C, whatever the bytes of the codes."""
        return len(self.codes), self.columns

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those there are, by name."""
        named = {name: getattr(self, name) for name in ("codes", "scales", "column_groups", "zeros")}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The same matrix on another device."""
        there: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **there)

    def dequantized(self) -> torch.Tensor:
        """[O, C] float32."""
        decoder = decoder_of(self)
        numbers = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        for first in range(0, len(numbers), _ROWS_AT_ONCE):
            tile = decoder.tile(first, first + _ROWS_AT_ONCE, torch.float32)
            numbers[first : first + len(tile)] = self.code.together(tile, self.columns)
        return numbers if decoder.after is None else numbers.mul_(decoder.after)

    def project(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """rows [n, C], bfloat16 or float32, n > 0 -> [n, O] float32: `out`, or a new one."""
        decoder, out = decoder_of(self), rows.new_empty(len(rows), len(self.codes), dtype=torch.float32) if out is None else out
        if len(rows) <= _FEW_ROWS:
            out.copy_(decoder.few(self.code.apart(rows.float())).t())
        else:
            self._by_tiles(self.code.apart(rows), decoder, out)
        return out if decoder.after is None else out.mul_(decoder.after.t())

    def _by_tiles(self, rows: torch.Tensor, decoder: Decoder, out: torch.Tensor) -> None:
        """rows [n, C] in the order of the numbers."""
        step = max(1, _TILE // max(1, rows.shape[1]))
        for first in range(0, len(self.codes), step):
            tile = decoder.tile(first, first + step, rows.dtype)
            out[:, first : first + len(tile)] = F.linear(rows, tile)
