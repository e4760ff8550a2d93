"""Whole numbers of few bits in 32-bit words, with a zero and a scale for each group of columns. R rows, C columns, G groups.

Three orders of the words are in use: along the columns (compressed-tensors, "pack-quantized"), along the columns of the transpose's rows
(GPTQ) and along the rows of the transpose in an order of their own (AWQ).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from moeserve.checkpoints.formats.bits import covering, unpacked
from moeserve.checkpoints.formats.coded import Coded, groups
from moeserve.checkpoints.formats.number_format import FLOATS, Block, CodedFormat, Kind, Piece, Read

_WORD: Final = 32


@dataclass(frozen=True)
class Packed(CodedFormat):
    """What the three have in common: number = (code - zero) * scale.

    group: columns that share a scale, None = all. zeros: "" = the middle of the codes. order: a tensor with the group of each column, "" =
    neighbors share one (GPTQ's `desc_act`: Frantar et al. 2022, arXiv 2210.17323).
    """

    name: str
    scales: str
    bits: int = 4
    group: int | None = 128
    zeros: str = ""
    order: str = ""
    known: tuple[str, ...] = ()

    #: whether an order of nothing but -1 means that there is none
    may_be_unordered: ClassVar[bool] = False
    #: that rows share scales too is said by those formats in which they can
    is_whole = False
    scale_types = ("F16", "BF16", "F32")

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    def kind(self) -> Kind:
        return "int8" if self.bits > 4 else "int4"

    @property
    def block(self) -> Block:
        return None if self.is_whole else 1, self.group

    @property
    def has_zeros(self) -> bool:
        return bool(self.zeros)

    @property
    def has_order(self) -> bool:
        return bool(self.order)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.name, self.scales, self.zeros, self.order) if name)

    @property
    def _per_word(self) -> int:
        return _WORD // self.bits

    def _groups(self, read: Read, columns: slice) -> tuple[slice, torch.Tensor]:
        """Which groups the columns are in, and for each which of these."""
        if not self.order:
            return groups(columns, self.group)
        of_column = read(self.order, slice(0, 1), columns).flatten().long()
        first, last = (int(extreme) for extreme in torch.aminmax(of_column))
        if first == last == -1 and self.may_be_unordered:
            return groups(columns, self.group)
        if first < 0:
            raise ValueError(f"{self.order} names group {first}; allowed: from 0")
        return slice(first, last + 1), of_column - first

    def _count(self, columns: int) -> int:
        return 1 if self.group is None else -(-columns // self.group)

    def _must_be_words(self, rows: int, columns: int) -> None:
        if rows % self._per_word or columns % self._per_word:
            raise ValueError(f"is {rows} x {columns}, but {self.title} packs {self._per_word} numbers in a word")

    def _order_piece(self, columns: int) -> dict[str, Piece]:
        return {self.order: Piece((1, columns), ("I32",), (columns,))} if self.order else {}


@dataclass(frozen=True)
class PackedColumns(Packed):
    """compressed-tensors, "pack-quantized": codes [R, C / 8], zeros [R / 8, G] packed along the rows, scales [R, G], at 4 bits.

    is_whole: one scale for all rows too.
    """

    is_whole: bool = False

    may_be_unordered: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return f"packed int{self.bits}"

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        rows, columns = shape
        words, count = -(-columns // self._per_word), self._count(columns)
        packed_rows = -(-rows // self._per_word)
        pieces = {
            self.name: Piece((rows, words), ("I32",), (rows, words)),
            self.scales: Piece.of_scales((1 if self.is_whole else rows, count), FLOATS),
        }
        zeros = {self.zeros: Piece((packed_rows, count), ("I32",), (packed_rows, count))} if self.zeros else {}
        return {**pieces, **zeros, **self._order_piece(columns)}

    def coded(self, read: Read, rows: slice, columns: slice) -> Coded:
        down, row_group = groups(rows, self.block[0])
        across, column_group = self._groups(read, columns)
        words, within = covering(columns, self._per_word)
        codes = unpacked(read(self.name, rows, words), self.bits)[:, within]
        return Coded(codes, read(self.scales, down, across).float(), row_group, column_group, self._zeros(read, rows, across))

    def _zeros(self, read: Read, rows: slice, across: slice) -> torch.Tensor:
        if not self.zeros:
            return torch.full((1, 1), 2.0 ** (self.bits - 1), dtype=torch.float32)
        words, within = covering(rows, self._per_word)
        return unpacked(read(self.zeros, words, across).t(), self.bits)[:, within].t().float()
