"""What a published format of numbers is to those who read files. R rows, C columns of a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final, Literal, Protocol

import torch

from moeserve.checkpoints.formats.coded import Coded

#: what a code is: 8 or 4 bits of a whole number or of a float
Kind = Literal["int8", "fp8", "int4", "fp4"]
#: rows and columns that share a scale; None is all of them
Block = tuple[int | None, int | None]
#: what `read(name, rows, columns)` gives: that part of a stored matrix, contiguous, in the type it is stored in
Read = Callable[[str, slice, slice], torch.Tensor]

FLOATS: Final = ("F32", "F16", "BF16")
#: 8-bit floats: those of the Open Compute Project, and those of graphics cards that have neither -0 nor Inf
FP8: Final = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
#: powers of two, as the exponent plus 127 in a byte (E8M0)
EXPONENTS: Final = ("U8", "F8_E8M0")


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a format: the matrix it is read as, the types it may have in the file, and its shape there.

    A stack of experts has one dimension more in front. is_loose: dimensions of 1 do not count: [R, 1] and [R], [1] and [] are all in use.
    """

    matrix: tuple[int, int]
    types: tuple[str, ...]
    shape: tuple[int, ...]
    is_loose: bool = False

    @classmethod
    def of_scales(cls, matrix: tuple[int, ...], types: tuple[str, ...]) -> Piece:
        rows, columns = matrix
        return cls((rows, columns), types, (rows, columns), is_loose=True)

    def fits(self, found: tuple[int, ...], stack: tuple[int, ...] = ()) -> bool:
        """Whether a tensor of shape `found` is this one, or a `stack` of them."""
        expected = (*stack, *self.shape)
        if not self.is_loose:
            return found == expected
        return [size for size in found if size != 1] == [size for size in expected if size != 1]


class NumberFormat(Protocol):
    """How one weight is stored, and how to get its numbers. Made from names and config.json alone; see `schemes`."""

    @property
    def title(self) -> str:
        """As documents and messages call it."""
        ...

    @property
    def is_turned(self) -> bool:
        """Whether a row of the weight is a column in the file, so that a part of few rows is in many places."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors, the one with the numbers first."""
        ...

    @property
    def known(self) -> tuple[str, ...]:
        """Tensors that may stand beside the pieces and do not matter here: scales of activations, shapes."""
        ...

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        """The stored tensors of a weight of `shape`, by name. Raises ValueError when the format cannot hold that shape."""
        ...

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        """[R, C] of some float type."""
        ...


class CodedFormat(ABC):
    """A `NumberFormat` of few bits: numbers are codes, scales, and perhaps zeros."""

    is_turned: ClassVar[bool] = False

    @property
    @abstractmethod
    def title(self) -> str:
        """As documents and messages call it."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The stored tensors: codes, scales, and others."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What the codes are."""

    @property
    @abstractmethod
    def block(self) -> Block:
        """Rows and columns that share a scale."""

    @property
    @abstractmethod
    def scale_types(self) -> tuple[str, ...]:
        """The types that the scales may have, the usual one first."""

    @property
    def has_zeros(self) -> bool:
        """Whether there is a number that stands for zero beside each scale."""
        return False

    @property
    def has_order(self) -> bool:
        """Whether a tensor says which columns share a scale."""
        return False

    @abstractmethod
    def coded(self, read: Read, rows: slice, columns: slice) -> Coded:
        """The part as it is stored, for those who keep it so."""

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        return self.coded(read, rows, columns).numbers()


@dataclass(frozen=True)
class Plain:
    """The numbers themselves, in any number of dimensions: a vector is a matrix of one row."""

    name: str

    is_turned = False
    title = "as they are"
    known = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def pieces(self, shape: tuple[int, ...]) -> Mapping[str, Piece]:
        matrix = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
        return {self.name: Piece(matrix, FLOATS, shape)}

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        return read(self.name, rows, columns)
