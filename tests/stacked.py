"""Feed-forward experts laid on one another, as oracles like them. E experts, H hidden size, I intermediate size, G = 2I or I."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from moeserve.config import Activation
from moeserve.experts import Expert, ExpertBank, ExpertShard, FeedForward
from moeserve.host import Shelf


class Stacked(NamedTuple):
    """gate_up_proj [E, G, H], down_proj [E, H, I], gate_up_bias [E, G] and down_bias [E, H] or None."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def experts(self, activation: Activation) -> list[FeedForward]:
        tensors = {name: tensor for name, tensor in self._asdict().items() if tensor is not None}
        return [FeedForward(activation, **{name: tensor[slot] for name, tensor in tensors.items()}) for slot in range(len(self.down_proj))]


def stacked(experts: Sequence[Expert]) -> Stacked:
    parts = [expert for expert in experts if isinstance(expert, FeedForward)]
    assert len(parts) == len(experts) > 0
    return Stacked(**{name: torch.stack([getattr(expert, name) for expert in parts]) for name in parts[0].tensors})


def shelf_of(banks: Mapping[int, ExpertBank]) -> Shelf:
    """Banks by layer number, valid at every epoch."""
    shelf = Shelf()
    for layer, bank in banks.items():
        shelf.put(layer, 0, bank)
    return shelf


def whole(expert_ids: Iterable[int]) -> list[ExpertShard]:
    return [ExpertShard(expert) for expert in expert_ids]
