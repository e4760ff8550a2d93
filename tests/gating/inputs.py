"""Random logits and masks of a given seed. T tokens, E experts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**32)
COUNTS = st.integers(0, 12)


def logits_of(seed: int, num_tokens: int, num_experts: int, is_tied: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if is_tied:
        return torch.randint(-2, 3, (num_tokens, num_experts), generator=generator).float()
    return torch.randn(num_tokens, num_experts, generator=generator)


def used_of(seed: int, num_tokens: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(num_tokens, generator=generator) < 0.7 if seed % 2 else None


def as_list(used: Tensor | None, num_tokens: int) -> list[bool]:
    return [True] * num_tokens if used is None else used.tolist()
