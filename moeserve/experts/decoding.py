"""Tiles of a matrix in few bits as numbers: by the compiled code, or by torch's operators where that cannot be.

O output and C input channels, S x G scales, r output channels of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import torch
import torch.nn.functional as F

from moeserve.experts.codes import FP8, Code
from moeserve.experts.scale_groups import ScaleGroups
from moeserve.kernels import CodedTile, can_decode, decode, multiply, scratch

if TYPE_CHECKING:
    from moeserve.experts.quantized_matrix import QuantizedMatrix

# Numbers that are decoded just before they are multiplied: few enough to stay in the second-level cache.
_TILE: Final = 2**17


class Decoder(Protocol):
    """For one projection. after: [O or 1, 1] float32 that sums, or numbers, are yet to be multiplied with; None = nothing."""

    after: torch.Tensor | None

    def tile(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """[r, C] in the order of `Code.apart`, bfloat16 or float32; valid until the next one."""
        ...

    def few(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, C] float32, in that order -> [O, n] float32, yet to be multiplied with `after`."""
        ...


def decoder_of(matrix: QuantizedMatrix) -> Decoder:
    """The faster one that can."""
    is_compiled = matrix.code.compiled is not None and matrix.codes.device.type == "cpu" and can_decode()
    return CompiledDecoder(matrix) if is_compiled else TorchDecoder(matrix)


def scales_in_float32(matrix: QuantizedMatrix, unit: float) -> torch.Tensor:
    """[S, G] of what codes are to be multiplied with, times `unit`."""
    by, scales = matrix.factor * unit, matrix.scales
    # CPUs cast float8 one by one, see codes.py.
    return FP8.numbers(scales, torch.float32) * (by * FP8.unit) if scales.dtype == FP8.dtype else scales.float() * by


def scales_of_channels(matrix: QuantizedMatrix) -> torch.Tensor:
    """[O] float32, of a matrix whose rows have one scale each."""
    return _of_rows(matrix, scales_in_float32(matrix, 1.0), 0, len(matrix.codes)).flatten()


def _scales_sums(matrix: QuantizedMatrix) -> bool:
    """Whether all columns of a row share a scale, which can wait until the sums are there."""
    return matrix.scales.shape[1] == 1 and matrix.zeros is None


def _of_rows(matrix: QuantizedMatrix, of_groups: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """[S, G] -> [r, G]."""
    if matrix.row_groups.size == 1:
        return of_groups[first:last]
    return of_groups[matrix.row_groups.index(first, last).to(of_groups.device)]


def _columns_of_group(code: Code, groups: ScaleGroups | torch.Tensor, columns: int) -> int | None:
    """In the order of `Code.apart`; None where that breaks groups up."""
    parts = 8 // code.bits
    is_whole = isinstance(groups, ScaleGroups) and groups.are_whole(columns) and groups.size % parts == 0
    return groups.size // parts if isinstance(groups, ScaleGroups) and is_whole else None


def _group_of_column(code: Code, groups: ScaleGroups | torch.Tensor, columns: int) -> torch.Tensor:
    """[C] int32 in the order of `Code.apart`."""
    index = groups.index(0, columns) if isinstance(groups, ScaleGroups) else groups
    return code.apart(index[None].to(torch.int32))[0]


class TorchDecoder:
    """By operators, on any device."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self._matrix = matrix
        scales, self._unit = scales_in_float32(matrix, matrix.code.unit), 1.0
        if not scales.isfinite().all():
            # The largest scales of FP4 have no room for a unit: numbers take it first.
            scales, self._unit = scales_in_float32(matrix, 1.0), matrix.code.unit
        self.after = _of_rows(matrix, scales, 0, len(matrix.codes)) if _scales_sums(matrix) else None
        self._scales = None if _scales_sums(matrix) or not matrix.codes.numel() else scales
        self._width = _columns_of_group(matrix.code, matrix.column_groups, matrix.columns)
        index = _group_of_column(matrix.code, matrix.column_groups, matrix.columns) if self._width is None else None
        self._index = None if index is None else index.to(matrix.codes.device)

    def tile(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        matrix, codes = self._matrix, self._matrix.codes[first:last]
        if self._scales is None:
            numbers = matrix.code.numbers(codes, dtype)
            return numbers.mul_(self._unit) if self._unit != 1 else numbers
        numbers, last = matrix.code.numbers(codes, torch.float32), first + len(codes)
        if self._unit != 1:
            numbers.mul_(self._unit)
        if matrix.zeros is not None:
            grouped, zeros = self._grouped(numbers, _of_rows(matrix, matrix.zeros, first, last).float())
            grouped.sub_(zeros)
        grouped, scales = self._grouped(numbers, _of_rows(matrix, self._scales, first, last))
        grouped.mul_(scales)
        return numbers.to(dtype)

    def few(self, rows: torch.Tensor) -> torch.Tensor:
        sums = rows.new_empty(len(self._matrix.codes), len(rows))
        step = max(1, _TILE // max(1, rows.shape[1]))
        for first in range(0, len(sums), step):
            sums[first : first + step] = F.linear(rows, self.tile(first, first + step, torch.float32)).t()
        return sums

    def _grouped(self, numbers: torch.Tensor, of_groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """numbers [r, C] and what each group of each row has [r, G], as views that broadcast to each other."""
        if self._index is not None:
            return numbers, of_groups.index_select(1, self._index)
        halves = numbers.unflatten(1, (8 // self._matrix.code.bits, -1))
        return halves.unflatten(2, (of_groups.shape[1], -1)), of_groups[:, None, :, None]


class CompiledDecoder:
    """By csrc/decode.c: two to four times as fast."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self._matrix = matrix
        scales = scales_in_float32(matrix, 1.0).contiguous()
        self.after = _of_rows(matrix, scales, 0, len(matrix.codes)) if _scales_sums(matrix) else None
        width = _columns_of_group(matrix.code, matrix.column_groups, matrix.columns)
        index = _group_of_column(matrix.code, matrix.column_groups, matrix.columns) if width is None else None
        assert all(tensor.is_contiguous() for tensor in matrix.tensors.values())
        zeros, is_scaled = matrix.zeros, self.after is None and matrix.codes.numel() > 0
        self._coded = CodedTile(
            code=matrix.code.compiled,
            bytes=matrix.codes.shape[1],
            scales=scales.data_ptr() if is_scaled else None,
            zeros=zeros.data_ptr() if is_scaled and zeros is not None else None,
            groups=scales.shape[1],
            group_size=width or 0,
            row_size=matrix.row_groups.size,
            row_cut=matrix.row_groups.cut,
            index=None if index is None else index.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        self._kept = scales, index

    def tile(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        matrix = self._matrix
        rows, width = max(0, min(last, len(matrix.codes)) - first), matrix.codes.shape[1] * 8 // matrix.code.bits
        # The same memory for every tile, because fresh memory costs page faults.
        nbytes = rows * width * dtype.itemsize
        out = scratch(nbytes)[:nbytes].view(dtype).view(rows, width)
        decode(self._at(first, rows, out))
        return out

    def few(self, rows: torch.Tensor) -> torch.Tensor:
        sums = rows.new_empty(len(self._matrix.codes), len(rows))
        multiply(self._at(0, len(sums), sums), rows.contiguous())
        return sums

    def _at(self, first: int, rows: int, out: torch.Tensor) -> CodedTile:
        coded = self._coded
        coded.to_bf16, coded.first_row, coded.rows = out.dtype == torch.bfloat16, first, rows
        coded.codes, coded.out = self._matrix.codes.data_ptr() + first * coded.bytes, out.data_ptr()
        return coded
