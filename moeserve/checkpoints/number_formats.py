"""How numbers are stored: as they are, or in blocks that share a scale. R rows, C columns of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

#: what `read(name, rows, columns)` gives: that part of a stored matrix, contiguous, in the type it is stored in
Read = Callable[[str, slice, slice], torch.Tensor]

PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8: Final = "F8_E4M3"

#: the number in each of the 256 bytes: looking it up is five times as fast as converting
_FP8_VALUES: Final = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

#: the sixteen values of FP4 (E2M1), Open Compute Project, Microscaling Formats (MX) v1.0, 2023
_FP4_VALUES: Final = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], dtype=np.float32)
#: the two values in each of the 256 bytes, as one item of eight bytes: looking up pairs is ten times as fast as taking bytes apart
_FP4_PAIRS: Final = np.stack([np.tile(_FP4_VALUES, 16), np.repeat(_FP4_VALUES, 16)], axis=1).view(np.int64).ravel()
_MX_BLOCK: Final = 32


class NumberFormat(Protocol):
    """How to get numbers out of what is stored."""

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The tensors that a tensor of `shape` is stored as, by name, with their shapes."""
        ...

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        """[R, C] of some float type."""
        ...


@dataclass(frozen=True)
class Plain:
    """The numbers themselves."""

    name: str

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {self.name: shape}

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        return read(self.name, rows, columns)


@dataclass(frozen=True)
class Fp8Blocks:
    """FP8 (E4M3) with a float32 scale for each block of `block` rows x columns: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2)."""

    name: str
    scales: str
    block: tuple[int, int] = (128, 128)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        blocks = tuple(-(-size // block) for size, block in zip(shape[-2:], self.block, strict=True))
        return {self.name: shape, self.scales: (*shape[:-2], *blocks)}

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        down, across = (_covering(part, size) for part, size in zip((rows, columns), self.block, strict=True))
        of_row = torch.arange(rows.start, rows.stop) // self.block[0] - down.start
        scales = read(self.scales, down, across).float()[of_row]
        start = across.start * self.block[1]
        spread = scales[:, :, None].expand(-1, -1, self.block[1]).flatten(1)[:, columns.start - start : columns.stop - start]
        numbers = torch.from_numpy(_FP8_VALUES.take(read(self.name, rows, columns).view(torch.uint8).numpy()))
        return numbers.mul_(spread)


@dataclass(frozen=True)
class Mxfp4:
    """MXFP4: 32 columns of FP4, two in a byte with the first in the low half, share a power of two, stored with a bias of 127.

    `name` [R, C / 32, 16] and `scales` [R, C / 32], both uint8.
    """

    name: str
    scales: str

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        blocks = (*shape[:-1], shape[-1] // _MX_BLOCK)
        return {self.name: (*blocks, _MX_BLOCK // 2), self.scales: blocks}

    def read(self, read: Read, rows: slice, columns: slice) -> torch.Tensor:
        blocks = _covering(columns, _MX_BLOCK)
        packed = read(self.name, rows, slice(blocks.start * 16, blocks.stop * 16))
        exponents = read(self.scales, rows, blocks).int() - 127
        scales = torch.ldexp(torch.ones(exponents.shape), exponents)
        numbers = torch.from_numpy(_FP4_PAIRS.take(packed.numpy()).view(np.float32))
        numbers.view(len(numbers), -1, _MX_BLOCK).mul_(scales[:, :, None])
        start = blocks.start * _MX_BLOCK
        return numbers[:, columns.start - start : columns.stop - start]


def _covering(part: slice, block: int) -> slice:
    """The blocks that `part` lies in."""
    return slice(part.start // block, -(-part.stop // block))
