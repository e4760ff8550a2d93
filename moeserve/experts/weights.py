"""Stacked weights of the experts one host holds of one layer.

E experts held here, H hidden size, I intermediate size, G = 2I when the activation is gated, else I.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch


class SingleExpert(NamedTuple):
    """gate_up_proj [G, H], down_proj [H, I], gate_up_bias [G] and down_bias [H] or None."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


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

    @cached_property
    def single(self) -> list[SingleExpert]:
        """Each expert's own weights: views."""
        gate_up_bias = [None] * self.num_experts if self.gate_up_bias is None else self.gate_up_bias.unbind()
        down_bias = [None] * self.num_experts if self.down_bias is None else self.down_bias.unbind()
        return list(map(SingleExpert, self.gate_up_proj.unbind(), self.down_proj.unbind(), gate_up_bias, down_bias))

    def to(self, device: torch.device) -> ExpertWeights:
        """The same weights on `device`."""
        return ExpertWeights(**{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
