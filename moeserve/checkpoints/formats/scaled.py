"""Numbers of 8 bits that share a scale by tensor, by channel, by group or by block. R rows, C columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moeserve.checkpoints.formats.coded import Coded, groups, scale_values
from moeserve.checkpoints.formats.number_format import EXPONENTS, FLOATS, FP8, Block, CodedFormat, Kind, Piece, Read

_WHOLE: Final[Mapping[Block, str]] = {(None, None): "per tensor", (1, None): "per channel", (None, 1): "per channel"}


@dataclass(frozen=True)
class Scaled(CodedFormat):
    """Number = stored number * scale, one for each block.

    FP8 in blocks: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2); in blocks of 1 x 32 with exponents for scales: MXFP8 (Open Compute
    Project, Microscaling Formats v1.0, 2023); by channel: (None of C), one scale for each row. zeros: a tensor like the scales with the
    number that stands for zero, "" = it is 0.
    """

    name: str
    scales: str
    block: Block = (128, 128)
    types: tuple[str, ...] = FP8
    scale_types: tuple[str, ...] = (*FLOATS, *EXPONENTS)
    zeros: str = ""
    known: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.kind.upper()} {_WHOLE.get(self.block) or ' x '.join(map(str, self.block))}"

    @property
    def kind(self) -> Kind:
        return "int8" if self.types == ("I8",) else "fp8"

    @property
    def has_zeros(self) -> bool:
        return bool(self.zeros)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.scales, self.zeros) if self.zeros else (self.name, self.scales)

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        rows, columns = shape
        scales = tuple(1 if size is None else -(-whole // size) for whole, size in zip(shape, self.block, strict=True))
        pieces = {self.name: Piece((rows, columns), self.types, shape), self.scales: Piece.of_scales(scales, self.scale_types)}
        return pieces | ({self.zeros: Piece.of_scales(scales, self.types)} if self.zeros else {})

    def coded(self, read: Read, rows: slice, columns: slice) -> Coded:
        (down, row_group), (across, column_group) = (groups(part, size) for part, size in zip((rows, columns), self.block, strict=True))
        scales = scale_values(read(self.scales, down, across))
        zeros = read(self.zeros, down, across).float() if self.zeros else None
        return Coded(read(self.name, rows, columns), scales, row_group, column_group, zeros)
