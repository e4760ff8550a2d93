"""Experts of classes that a service can import."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, EXPERTS = 12, 6


class Block(nn.Module):
    """An expert that answers a tuple, as those of Megatron-LM do."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.down(F.silu(self.up(x))), None


class Counting(nn.Module):
    """Has a tensor that is not float."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def sequential(width: int = 20, activation: type[nn.Module] = nn.GELU, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, width, bias=bias), activation(), nn.Linear(width, HIDDEN, bias=bias))


def shaken(layer: nn.Module) -> nn.Module:
    """Copies of one expert made to differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return layer.eval()
