"""How a weight is written in 8 or 4 bits, and which number it stands for.

r rows, C columns of a matrix; 4 bits: two codes in a byte, the first of them in the low half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Code:
    """numbers: [r, C] as held -> [r, C] as numbers * `unit` say, in bfloat16 or float32, exactly.

    Of 4-bit codes, numbers come apart: first the even columns, then the odd ones (see `Code.apart`).
    """

    name: str
    bits: int
    #: element type of what is held: one code, or two
    dtype: torch.dtype
    #: a power of two
    unit: float
    #: magnitude of the largest number
    largest: float
    numbers: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    #: what csrc/decode.c calls it, None = it has no such code
    compiled: int | None = None
    #: bytes that are no finite number
    broken: frozenset[int] = frozenset()

    def are_finite(self, held: torch.Tensor) -> bool:
        """Whether all that is held are finite numbers."""
        return not any((held.view(torch.uint8) == byte).any() for byte in self.broken)

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """[r, C], one code in a byte -> as held."""
        if self.bits == 8:
            return codes.contiguous()
        low, high = _pairs(codes.view(torch.uint8)).unbind(2)
        return ((low & 15) | (high << 4)).contiguous()

    def apart(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] in the order in which numbers come; an odd column is followed by a zero."""
        return rows if self.bits == 8 else _pairs(rows).transpose(1, 2).flatten(1)

    def together(self, numbers: torch.Tensor, columns: int) -> torch.Tensor:
        """The inverse: [n, C] in the order of the columns."""
        if self.bits == 8:
            return numbers
        together: torch.Tensor = numbers.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        return together[:, :columns]


def _pairs(rows: torch.Tensor) -> torch.Tensor:
    """[n, C] -> [n, half of C, 2]."""
    pairs: torch.Tensor = F.pad(rows, (0, rows.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs


_NAN_E4M3: Final = frozenset({0x7F, 0xFF})
_INF_E5M2: Final = frozenset({*range(0x7C, 0x80), *range(0xFC, 0x100)})


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype)


# CPUs cast float8 one by one, float16 many at once. So sign, exponent and fraction are put where float16 has them: then every number, those
# without an implicit one too, is a power of two smaller than it was, by the difference between the biases of the two exponents.
def _e4m3(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().to(dtype)


def _e5m2(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.view(torch.int8).to(torch.int16).bitwise_left_shift_(8).view(torch.float16).float().to(dtype)


def _e2m1(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bits = _halves(values).to(torch.int16).bitwise_left_shift_(5).bitwise_and_(~0x71FF)
    return bits.view(torch.float16).flatten(1).float().to(dtype)


def _int4(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _halves(values).bitwise_right_shift_(4).flatten(1).to(dtype)


def _halves(values: torch.Tensor) -> torch.Tensor:
    """[r, B] bytes -> [r, 2, B] int8 with the first code, then the second, in the high half; in the low half is something else."""
    both = values.view(torch.int8)
    return torch.stack([both << 4, both], 1)


#: whole numbers -128..127
INT8: Final = Code("int8", 8, torch.int8, 1.0, 128.0, _cast, 0)
#: whole numbers -8..7, two's complement
INT4: Final = Code("int4", 4, torch.uint8, 1.0, 8.0, _int4, 3)
#: E4M3: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433
FP8: Final = Code("fp8", 8, torch.float8_e4m3fn, 2.0**8, 448.0, _e4m3, 1, _NAN_E4M3)
#: E2M1: Open Compute Project, Microscaling Formats (MX) v1.0, 2023
FP4: Final = Code("fp4", 4, torch.uint8, 2.0**14, 6.0, _e2m1, 4)
#: the others: E5M2 of the same paper, and those without -0 and Inf of some graphics cards
_OTHER_FP8: Final = (
    Code("fp8 e5m2", 8, torch.float8_e5m2, 1.0, 57344.0, _e5m2, 2, _INF_E5M2),
    Code("fp8 e4m3fnuz", 8, torch.float8_e4m3fnuz, 2.0**7, 240.0, _e4m3, broken=frozenset({0x80})),
    Code("fp8 e5m2fnuz", 8, torch.float8_e5m2fnuz, 1.0, 57344.0, _cast, broken=frozenset({0x80})),
)
_FP8: Final = {code.dtype: code for code in (FP8, *_OTHER_FP8)}


def float_code(dtype: torch.dtype) -> Code:
    """That of a torch type of 8 bits, else FP4."""
    return _FP8.get(dtype, FP4)
