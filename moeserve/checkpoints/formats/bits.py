"""Several codes in a byte, the first in the lowest bits, as every format here packs them: words are little-endian rows of bytes."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

#: bits of a code that bytes hold whole
WIDTHS: Final = (2, 4, 8)


def _table(bits: int) -> np.ndarray:
    """The codes in each of the 256 bytes, as one item: looking them up is ten times as fast as taking bytes apart."""
    shifts = np.arange(0, 8, bits)
    codes = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    items: np.ndarray = codes.astype(np.uint8).view({2: np.uint32, 4: np.uint16, 8: np.uint8}[bits])
    return items.ravel()


_TABLES: Final = {bits: _table(bits) for bits in WIDTHS}


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, N] of bytes or 32-bit words -> the codes in each row, uint8."""
    # Of one row or column, any strides count as contiguous, but bytes can be seen only where the last is 1.
    is_dense = packed.is_contiguous() and packed.stride(-1) == 1
    in_bytes = (packed if is_dense else packed.clone(memory_format=torch.contiguous_format)).view(torch.uint8)
    return in_bytes if bits == 8 else torch.from_numpy(_TABLES[bits].take(in_bytes.numpy()).view(np.uint8))


def covering(part: slice, per_item: int) -> tuple[slice, slice]:
    """The packed items that hold `part`, and where in what is unpacked of them it is."""
    items = slice(part.start // per_item, -(-part.stop // per_item))
    start = items.start * per_item
    return items, slice(part.start - start, part.stop - start)
