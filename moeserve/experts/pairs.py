"""What is asked of experts of one kind.

N (row, expert) pairs, those of one expert together, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Pairs(NamedTuple):
    """Rows for experts, and what they weigh."""

    #: which row each pair reads; [N] int64
    row_index: torch.Tensor
    #: [E]
    tokens_per_expert: npt.NDArray[np.int64]
    #: what rows are multiplied by, rounded to their type; [N] float32, None = 1
    input_weights: torch.Tensor | None
    #: what answers are multiplied by; [N] float32
    weights: torch.Tensor
