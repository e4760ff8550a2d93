"""Feed-forward experts laid on one another, as oracles like them. E experts, H hidden size, I intermediate size, G = 2I or I."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from moeserve.config import Activation
from moeserve.experts import Expert, ExpertBank, ExpertShard, FeedForward, QuantizedFeedForward
from moeserve.host import BankTable


class Stacked(NamedTuple):
    """gate_up_proj [E, G, H], down_proj [E, H, I], gate_up_bias [E, G] and down_bias [E, H] or None."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def experts(self, activation: Activation) -> list[FeedForward]:
        tensors = {name: tensor for name, tensor in self._asdict().items() if tensor is not None}
        return [FeedForward(activation, **{name: tensor[slot] for name, tensor in tensors.items()}) for slot in range(len(self.down_proj))]


def in_full(expert: Expert) -> FeedForward:
    """With the numbers that a feed-forward expert in few bits stands for, in float32."""
    if isinstance(expert, FeedForward):
        return expert
    assert isinstance(expert, QuantizedFeedForward)
    gate_up = torch.cat([matrix.dequantized() for matrix in expert.gate_up_proj])
    return FeedForward(expert.activation, gate_up, expert.down_proj.dequantized(), expert.gate_up_bias, expert.down_bias)


def stacked(experts: Sequence[Expert]) -> Stacked:
    parts = [in_full(expert) for expert in experts]
    return Stacked(**{name: torch.stack([getattr(expert, name) for expert in parts]) for name in parts[0].tensors})


def bank_table_of(banks: Mapping[int, ExpertBank]) -> BankTable:
    """Banks by layer number, valid at every epoch."""
    bank_table = BankTable()
    for layer, bank in banks.items():
        bank_table.put(layer, 0, bank)
    return bank_table


def whole(expert_ids: Iterable[int]) -> list[ExpertShard]:
    return [ExpertShard(expert) for expert in expert_ids]
