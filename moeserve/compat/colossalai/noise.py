"""ColossalAI's noise generators: what a router adds to its logits in training. T tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor


class NormalNoiseGenerator:
    """Adds N(0, std) with std = 1 / num_experts^2. The original's text reads like a variance; its code makes it the deviation, as here."""

    def __init__(self, num_experts: int) -> None:
        self.std = 1.0 / num_experts**2

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, E] -> [T, E]; random numbers come from torch's global generator."""
        return inputs + torch.randn_like(inputs) * self.std


class UniformNoiseGenerator:
    """Multiplies by U(1 - eps, 1 + eps)."""

    def __init__(self, eps: float = 1e-2) -> None:
        self.eps = eps

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, E] -> [T, E]; random numbers come from torch's global generator."""
        return inputs * torch.empty_like(inputs).uniform_(1 - self.eps, 1 + self.eps)
