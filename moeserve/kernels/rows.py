"""What is done with rows of numbers around the experts (csrc/rows.c), where the compiled code was built.

T tokens, R rows of one host, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Structure, c_int64, c_void_p
from functools import cache
from typing import Final

import torch

from moeserve.kernels.native import library
from moeserve.kernels.panels import TYPES

#: of the types of `TYPES`, those that may hold NaN and Inf are the first
_FLOATS: Final = 3
_TRIED: Final = 64


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
    if code is None or not all(_is_plain(partial) for _, partial in answers):
        return None
    out = torch.empty(num_tokens, hidden_size, dtype=torch.float32)
    of_hosts = (AnswerRows * len(answers))(*(AnswerRows(rows.numel(), rows.data_ptr(), partial.data_ptr()) for rows, partial in answers))
    code.add_answers(of_hosts, len(answers), num_tokens, hidden_size, out.data_ptr())
    return out


def normalize(scores: torch.Tensor, eps: float) -> torch.Tensor | None:
    """scores [T, K] / (their sum + eps), bit by bit as torch's operators do it; None where these have to."""
    code, (num_tokens, top_k) = library(), scores.shape
    if code is None or scores.requires_grad or not (_is_plain(scores) and _adds_up_as_torch(top_k)):
        return None
    out = torch.empty(num_tokens, top_k, dtype=torch.float32)
    code.normalize(scores.data_ptr(), num_tokens, top_k, eps, out.data_ptr())
    return out


def weighted_sum(counts: torch.Tensor, numbers: torch.Tensor) -> float | None:
    """The sum of counts [N] int64 * numbers [N] float32 as torch's operators do it; None as for `normalize`."""
    code, count = library(), counts.numel()
    if code is None or numbers.requires_grad or not (_is_plain(numbers) and counts.is_contiguous()):
        return None
    return _weighted_sum(code, counts, numbers, torch.empty(count, dtype=torch.float32)) if _adds_up_as_torch(count) else None


def _is_plain(numbers: torch.Tensor) -> bool:
    """Whether compiled code can read them where they are."""
    return numbers.is_cpu and numbers.dtype == torch.float32 and numbers.is_contiguous()


def _weighted_sum(code: CDLL, counts: torch.Tensor, numbers: torch.Tensor, products: torch.Tensor) -> float:
    return float(code.weighted_sum(counts.data_ptr(), numbers.data_ptr(), products.numel(), products.data_ptr()))


@cache
def _adds_up_as_torch(count: int) -> bool:
    """Whether both add up so many numbers in the same order, which differs between processors: tried once."""
    code, generator = library(), torch.Generator().manual_seed(count)
    numbers, space = torch.rand(_TRIED, count, generator=generator, dtype=torch.float32), torch.empty(count, dtype=torch.float32)
    ones = torch.ones(count, dtype=torch.int64)
    return code is not None and all(_weighted_sum(code, ones, row, space) == row.sum().item() for row in numbers)
