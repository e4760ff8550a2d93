"""Stacked weights of the experts one host holds of one layer.

E experts held here, H hidden size, I intermediate size, G = 2I when the activation is gated, else I.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up_proj [E, G, H] (gate rows first), down_proj [E, H, I], gate_up_bias [E, G] and down_bias [E, H] or None."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device) -> ExpertWeights:
        """The same weights on `device`."""
        return ExpertWeights(**{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
