"""A part of a matrix in few bits, whatever format it was published in, and the numbers it stands for.

R rows, C columns, S x G scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

_FP8: Final = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
#: the number of each of the 256 bytes: looking it up is five times as fast as converting
_FP8_VALUES: Final = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy() for dtype in _FP8}

#: the sixteen values of FP4 (E2M1), Open Compute Project, Microscaling Formats (MX) v1.0, 2023
FP4_VALUES: Final = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], dtype=np.float32)
_E8M0_BIAS: Final = 127


def _pairs() -> np.ndarray:
    pairs = np.zeros((16, 256, 2), dtype=np.float32)
    pairs[:, :16, 0], pairs[:, :, 1] = FP4_VALUES, FP4_VALUES[:, None]
    items: np.ndarray = pairs.view(np.int64)
    return items.ravel()


#: the numbers of two FP4 codes in neighboring bytes, as one item of eight bytes: half as many to look up
_FP4_PAIRS: Final = _pairs()


@dataclass(frozen=True, eq=False)
class Coded:
    """Number (i, j) = (value of codes[i, j] - zeros[s, g]) * scales[s, g] * factor, where s = row_group[i] and g = column_group[j].

    codes [R, C]: float8 of any kind and int8 are values themselves; uint8 are whole numbers 0..255, or, with `is_fp4`, codes 0..15 of FP4.
    scales [S, G] float32; zeros [S, G] float32 or None; row_group [R] and column_group [C] int64.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    row_group: torch.Tensor
    column_group: torch.Tensor
    zeros: torch.Tensor | None = None
    is_fp4: bool = False
    factor: float = 1.0

    def numbers(self) -> torch.Tensor:
        """[R, C] float32, decoded."""
        values = self._values()
        if self.zeros is not None:
            values -= self._spread(self.zeros)
        return values.mul_(self._spread(self.scales * self.factor))

    def _values(self) -> torch.Tensor:
        if self.is_fp4 and self.codes.shape[1] % 2 == 0:
            return torch.from_numpy(_FP4_PAIRS.take(self.codes.contiguous().numpy().view(np.uint16)).view(np.float32))
        table = FP4_VALUES if self.is_fp4 else _FP8_VALUES.get(self.codes.dtype)
        if table is None:
            return self.codes.float()
        return torch.from_numpy(table.take(self.codes.view(torch.uint8).numpy()))

    def _spread(self, of_group: torch.Tensor) -> torch.Tensor:
        """[S, G] -> what broadcasts to [R, C]."""
        if of_group.shape[0] > 1:
            of_group = of_group.index_select(0, self.row_group)
        return of_group.index_select(1, self.column_group) if of_group.shape[1] > 1 else of_group


def groups(part: slice, size: int | None) -> tuple[slice, torch.Tensor]:
    """The groups of `size` neighbors that `part` lies in, and for each index of it which of these; None: one group for all."""
    if size is None:
        return slice(0, 1), torch.zeros(part.stop - part.start, dtype=torch.int64)
    covering = slice(part.start // size, -(-part.stop // size))
    return covering, torch.arange(part.start, part.stop) // size - covering.start


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """float32; a byte is the exponent of a power of two (E8M0), of which 255 is NaN."""
    if stored.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        return stored.float()
    exponents = stored.view(torch.uint8).int()
    values = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float32), exponents - _E8M0_BIAS)
    return values.masked_fill_(exponents == 255, torch.nan)
