"""Layers of every kind of expert: H = 16, six experts that are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, EXPERTS = 16, 6

#: the gate, an expert, then the shared one and its mixer: hidden sizes and an intermediate one of at most 40 each
SUMMED = 4 * HIDDEN + 2 * 40


class Block(nn.Module):
    """An expert of one's own: keeps the shape, answers a tuple."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        for linear in self.inner:
            rows = torch.tanh(linear(self.norm(rows)))
        return rows, None


BLOCK = f"{__name__}:Block"

KINDS: Mapping[str, dict[str, Any]] = {
    "added": {"intermediate_size": 24, "shared_expert": {"intermediate_size": 40}},
    "gated": {"intermediate_size": 24, "shared_expert": {"intermediate_size": 40, "mixing": "sigmoid"}, "bias": True},
    "residual": {"intermediate_size": 24, "shared_expert": {"intermediate_size": 8, "mixing": "residual"}},
    "identity and zero": {"intermediate_size": 24, "identity_experts": 2, "zero_experts": 1},
    "unequal": {"intermediate_size": (8, 24, 3, 16, 40, 1)},
    "module": {"expert": BLOCK, "expert_args": {"width": HIDDEN, "depth": 2}},
    "module beside a shared expert": {"expert": BLOCK, "expert_args": {"width": HIDDEN}, "shared_expert": {"intermediate_size": 8}},
}
