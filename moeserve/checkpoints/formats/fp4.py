"""FP4 (E2M1), two numbers in a byte, the first in the low half. R rows, C columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch

from moeserve.checkpoints.formats.bits import covering, unpacked
from moeserve.checkpoints.formats.coded import Coded, groups, scale_values
from moeserve.checkpoints.formats.number_format import EXPONENTS, Block, CodedFormat, Kind, Piece, Read


@dataclass(frozen=True)
class Fp4(CodedFormat):
    """`group` columns share a scale, and all numbers one more where there is `global_scale`.

    MXFP4: 32 columns, the scale a power of two stored as its exponent (Open Compute Project, Microscaling Formats v1.0, 2023). NVFP4: 16
    columns, the scale FP8, and a global scale: a factor in modelopt's files, a divisor in those of compressed-tensors (`divides`).
    has_blocks: [R, C / group, group / 2], as gpt-oss has it, in place of [R, C / 2].
    """

    name: str
    scales: str
    group: int = 32
    types: tuple[str, ...] = ("U8",)
    scale_types: tuple[str, ...] = EXPONENTS
    global_scale: str = ""
    divides: bool = False
    has_blocks: bool = False
    known: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return "NVFP4" if self.global_scale else "MXFP4"

    @property
    def kind(self) -> Kind:
        return "fp4"

    @property
    def block(self) -> Block:
        return 1, self.group

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.scales, self.global_scale) if self.global_scale else (self.name, self.scales)

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        rows, columns = shape
        if columns % self.group:
            raise ValueError(f"has {columns} columns, which are no whole groups of {self.group} as {self.title} has them")
        count = columns // self.group
        packed = (rows, count, self.group // 2) if self.has_blocks else (rows, columns // 2)
        pieces = {
            self.name: Piece((rows, columns // 2), self.types, packed),
            self.scales: Piece((rows, count), self.scale_types, (rows, count)),
        }
        return pieces | ({self.global_scale: Piece.of_scales((1, 1), ("F32",))} if self.global_scale else {})

    def coded(self, read: Read, rows: slice, columns: slice) -> Coded:
        across, column_group = groups(columns, self.group)
        pairs, within = covering(columns, 2)
        codes = unpacked(read(self.name, rows, pairs), 4)[:, within]
        scales = scale_values(read(self.scales, rows, across))
        factor = 1.0
        if self.global_scale:
            one = read(self.global_scale, slice(0, 1), slice(0, 1)).item()
            if not isfinite(one) or (self.divides and not one):
                raise ValueError(f"tensor {self.global_scale} is {one}; allowed: a finite number{' but 0' if self.divides else ''}")
            factor = 1 / one if self.divides else one
        return Coded(codes, scales, torch.arange(rows.stop - rows.start), column_group, is_fp4=True, factor=factor)
