"""What is done with rows of numbers around the experts (csrc/rows.c), where the compiled code was built.

T tokens, R rows of one host, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p
from typing import Final

import torch

from moeserve.kernels.native import library
from moeserve.kernels.panels import TYPES

#: of the types of `TYPES`, those that may hold NaN and Inf are the first
_FLOATS: Final = 3


class AnswerRows(Structure):
    """struct answer of csrc/rows.c."""

    _fields_ = (("count", c_int64), ("rows", c_void_p), ("partial", c_void_p))


def all_finite(tensor: torch.Tensor) -> bool | None:
    """Whether no number of `tensor` is NaN or Inf; None where that is to be found out in another way."""
    code, number = library(), TYPES.get(tensor.dtype)
    if code is None or number is None or number >= _FLOATS or not (tensor.is_cpu and tensor.is_contiguous()):
        return None
    return bool(code.all_finite(tensor.data_ptr(), tensor.numel(), number))


def add_answers(answers: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int, hidden_size: int) -> torch.Tensor | None:
    """[T, H]: the sum of (rows [R] int64, partial [R, H] float32) in their order, 0 where there is none; None where there is no code."""
    code = library()
    if code is None or not all(is_plain(partial) for _, partial in answers):
        return None
    out = torch.empty(num_tokens, hidden_size, dtype=torch.float32)
    of_hosts = (AnswerRows * len(answers))(*(AnswerRows(rows.numel(), rows.data_ptr(), partial.data_ptr()) for rows, partial in answers))
    code.add_answers(of_hosts, len(answers), num_tokens, hidden_size, out.data_ptr())
    return out


def is_plain(numbers: torch.Tensor) -> bool:
    """Whether compiled code can read these float32 numbers where they are."""
    return numbers.is_cpu and numbers.dtype == torch.float32 and numbers.is_contiguous()
