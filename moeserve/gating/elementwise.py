"""Functions of single numbers, in two ways that differ by rounding.

torch computes what is left beside whole vectors by other code, so the last bits of a number depend on where in a tensor it lies, and so
on how many tokens there are. NumPy computes all of it alike: where answers must not depend on their company, it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Elementwise(NamedTuple):
    """Each from a float32 tensor to another of its shape: 1 / (1 + exp(-x)), log(1 + exp(x)), tanh(x)."""

    sigmoid: Callable[[Tensor], Tensor]
    softplus: Callable[[Tensor], Tensor]
    tanh: Callable[[Tensor], Tensor]


def _sigmoid(x: Tensor) -> Tensor:
    with np.errstate(over="ignore"):  # exp(-x) may well be infinite
        return torch.from_numpy(1 / (1 + np.exp(-x.numpy())))


def _softplus(x: Tensor) -> Tensor:
    numbers = x.numpy()
    return torch.from_numpy(np.maximum(numbers, 0) + np.log1p(np.exp(-np.abs(numbers))))


def _tanh(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.numpy()))


FAST: Final = Elementwise(torch.sigmoid, F.softplus, torch.tanh)
INVARIANT: Final = Elementwise(_sigmoid, _softplus, _tanh)
