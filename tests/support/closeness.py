"""How far apart two float32 computations of the same numbers may lie: what rounding does, from the arithmetic and not from one machine.

Processors, kernels and numbers of threads add the terms of a sum in different orders. A sum of n terms passes n roundings, each by at most
eps / 2 of what has been added up so far. They are independent, so that about sqrt(n) eps of the sum's size is left (Higham and Mary, A new
approach to probabilistic rounding error analysis, 2019). The bound is n eps, with n the terms of all sums on the way to a number: a factor
of sqrt(n) remains for what later steps magnify. Errors and sizes are norms of rows: a single number near zero is what large ones left.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

#: In eps of float32: what is not a sum. Exponentials, quotients, activations, weights cost a few units in the last place each.
POINTWISE = 16
#: In eps of a narrower type: rows, projections, activations, products and the answer are rounded to it, each by up to eps / 2, eight
#: times at worst. Sums of such numbers are float32.
NARROW = 4


def relative_bound(summed: int, rounded_to: torch.dtype = torch.float32) -> float:
    """Of numbers that are made of sums of `summed` terms, one after the other, and pass through the type `rounded_to`."""
    bound = torch.finfo(torch.float32).eps * (POINTWISE + summed)
    assert bound < torch.finfo(torch.bfloat16).eps / 16, "so many terms would hide numbers that are rounded to bfloat16"
    return bound if rounded_to == torch.float32 else bound + NARROW * torch.finfo(rounded_to).eps


def assert_close(actual: Tensor, expected: Tensor, summed: int | None = None, rounded_to: torch.dtype = torch.float32) -> None:
    """Every row [..., H] differs by at most `relative_bound` of its norm, or of that of rows on average, where it is smaller.

    A row of zeros is one that nobody has computed: it has no error. `summed` is 4 H unless told: in a layer the gate and the projection of
    an expert add up H terms each, its other projection up to 2 H.
    """
    assert actual.shape == expected.shape
    assert expected.dtype in {actual.dtype, torch.float64}
    bound = relative_bound(4 * actual.shape[-1] if summed is None else summed, rounded_to)
    actual, expected = (torch.atleast_2d(tensor.detach().double()).flatten(0, -2) for tensor in (actual, expected))
    error, norm = (actual - expected).norm(dim=1), expected.norm(dim=1)
    scale = norm.maximum(norm.square().mean().sqrt()).masked_fill(norm == 0, 0)
    is_off = ~(error <= bound * scale)
    assert not is_off.any(), f"{int(is_off.sum())} of {len(norm)} rows, the largest by {float((error / scale).max()):.1e} of {bound:.1e}"


def near(expected: Any, summed: int, size: float = 0.0) -> Any:
    """To compare with as `pytest.approx` is: a number, or several, of which every one is within `relative_bound`.

    size: that of the terms of sums that may cancel; what is left of them is no closer than they are.
    """
    bound = relative_bound(summed)
    return pytest.approx(expected, rel=bound, abs=bound * size or None)
