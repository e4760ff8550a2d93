"""A projection held in few bits, and multiplied without being decoded as a whole.

n rows, O output and C input channels, S x G scales, r output channels of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F

from moeserve.experts.codes import FP8, INT8, Code

# Tiles of so many numbers are decoded just before they are multiplied: for few rows, few enough to stay in the second-level cache; for
# many, enough for a matmul to be worth its call.
_FEW_ROWS: Final = 8
_TILE_OF_FEW: Final = 2**17
_TILE_OF_MANY: Final = 2**19
# The fused kernel reads whole vectors, past the end of a row of weights that is no multiple of them.
_FUSED_WIDTH: Final = 64


@dataclass(frozen=True)
class Groups:
    """Neighbors that share a scale: so many, of which the first group has lost `cut` in front."""

    size: int
    cut: int = 0

    @classmethod
    def of(cls, index: torch.Tensor) -> Groups | None:
        """Those of neighbors whose groups are `index`; None when these are in no such order."""
        if not len(index):
            return cls(1)
        sizes = torch.bincount(index)
        size = int(sizes.max())
        found = cls(size, size - int(sizes[0]) if len(sizes) > 1 else 0)
        return found if torch.equal(found.index(0, len(index)), index) else None

    def count(self, length: int) -> int:
        """Groups that so many neighbors are in."""
        return -(-(length + self.cut) // self.size)

    def index(self, first: int, last: int) -> torch.Tensor:
        """For each of these neighbors, its group."""
        return torch.div(torch.arange(first + self.cut, last + self.cut), self.size, rounding_mode="floor")

    def are_whole(self, length: int) -> bool:
        """Whether none is cut."""
        return not self.cut and length % self.size == 0


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
    row_groups: Groups
    column_groups: Groups | torch.Tensor
    zeros: torch.Tensor | None = None
    factor: float = 1.0

    def is_finite(self) -> bool:
        """Whether every number is, in float32."""
        scales = self._scales()
        if not (self.code.are_finite(self.codes) and scales.isfinite().all()):
            return False
        offset = 0 if self.zeros is None or not self.zeros.numel() else int(self.zeros.to(torch.int16).abs().max())
        largest = float(scales.abs().max()) * (self.code.largest + offset) / self.code.unit if scales.numel() else 0.0
        return largest <= torch.finfo(torch.float32).max or bool(self.dequantized().isfinite().all())

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.columns

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those there are, by name."""
        named = {name: getattr(self, name) for name in ("codes", "scales", "column_groups", "zeros")}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> QuantizedMatrix:
        there: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **there)

    def dequantized(self) -> torch.Tensor:
        """[O, C] float32."""
        scales = self._scales()
        numbers = self.code.together(self._tile(0, len(self.codes), scales, torch.float32), self.columns)
        return numbers.mul_(self._of_rows(scales, 0, len(numbers))) if self._scales_sums else numbers

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, C], bfloat16 or float32, n > 0 -> a new [n, O] float32."""
        scales = self._scales()
        sums = self._fused(rows) if self._is_fused(rows) else self._by_tiles(rows, scales)
        return (sums.mul_(self._of_rows(scales, 0, len(sums))) if self._scales_sums else sums).t()

    def _fused(self, rows: torch.Tensor) -> torch.Tensor:
        """[O, n] float32, not scaled yet."""
        return torch._weight_int8pack_mm(rows.contiguous(), self.codes, rows.new_ones(len(self.codes))).float().t()

    def _by_tiles(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """[O, n] float32."""
        is_few = len(rows) <= _FEW_ROWS
        # Few rows wait for numbers to be decoded: in float32 that is a step less, and nothing is rounded.
        rows = self.code.apart(rows.float() if is_few else rows)
        columns = rows[0] if len(rows) == 1 else rows.t()
        sums = rows.new_empty(len(self.codes), *columns.shape[1:])
        step = max(1, (_TILE_OF_FEW if is_few else _TILE_OF_MANY) // max(1, rows.shape[1]))
        for first in range(0, len(sums), step):
            numbers = self._tile(first, first + step, scales, rows.dtype)
            into = sums[first : first + step]
            if is_few and len(rows) > 1:
                into.copy_(F.linear(rows, numbers).t())
            else:
                torch.matmul(numbers, columns, out=into)
        return sums.float().view(len(sums), len(rows))

    @property
    def _scales_sums(self) -> bool:
        """Whether all columns of a row share a scale, which can wait until the sums are there."""
        return self.scales.shape[1] == 1 and self.zeros is None

    def _scales(self) -> torch.Tensor:
        """[S, G] float32: what `Code.numbers` are to be multiplied with."""
        by, scales = self.factor * self.code.unit, self.scales
        # CPUs cast float8 one by one, see `Code`.
        return FP8.numbers(scales, torch.float32) * (by * FP8.unit) if scales.dtype == FP8.dtype else scales.float() * by

    def _tile(self, first: int, last: int, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[r, C] in the order of `Code.numbers`; scaled unless `_scales_sums`."""
        codes = self.codes[first:last]
        if self._scales_sums or not codes.numel():
            return self.code.numbers(codes, dtype)
        numbers = self.code.numbers(codes, torch.float32)
        if self.zeros is not None:
            grouped, zeros = self._grouped(numbers, self._of_rows(self.zeros, first, first + len(codes)).float())
            grouped.sub_(zeros)
        grouped, spread = self._grouped(numbers, self._of_rows(scales, first, first + len(codes)))
        grouped.mul_(spread)
        return numbers.to(dtype)

    def _of_rows(self, of_groups: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """[S, G] -> [r, G]."""
        if self.row_groups.size == 1:
            return of_groups[first:last]
        return of_groups[self.row_groups.index(first, last).to(of_groups.device)]

    def _grouped(self, numbers: torch.Tensor, of_groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """numbers [r, C] and what each group of each row has [r, G], as views that broadcast to each other."""
        halves = numbers.unflatten(1, (8 // self.code.bits, -1))
        groups = self.column_groups
        if isinstance(groups, Groups) and groups.are_whole(self.columns) and groups.size % halves.shape[1] == 0:
            return halves.unflatten(2, (of_groups.shape[1], -1)), of_groups[:, None, :, None]
        index = groups.index(0, self.columns) if isinstance(groups, Groups) else groups
        index = self.code.apart(index[None].to(of_groups.device))[0]
        return halves, of_groups.index_select(1, index).view(halves.shape)

    def _is_fused(self, rows: torch.Tensor) -> bool:
        # A private operator: nothing public multiplies bfloat16 rows by int8 weights, and decoding takes longer than a few rows.
        return (
            self.code is INT8
            and self._scales_sums
            and len(rows) <= _FEW_ROWS
            and rows.dtype == torch.bfloat16
            and rows.device.type == "cpu"
            and rows.shape[1] > 0
            and rows.shape[1] % _FUSED_WIDTH == 0
            and hasattr(torch, "_weight_int8pack_mm")
        )
