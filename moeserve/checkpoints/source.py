"""Where one layer's weights come from, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moeserve.config import LayerSpec
from moeserve.experts import ExpertWeights


class LayerSource(Protocol):
    """E experts, H hidden size. Nothing is read before one of the methods is called."""

    @property
    def spec(self) -> LayerSpec: ...

    def gate(self) -> torch.Tensor:
        """The router's weight, [E, H] float32. Raises CheckpointError."""
        ...

    def experts(self, expert_ids: Sequence[int]) -> ExpertWeights:
        """The given experts, stacked in that order, in the spec's dtype; nothing else is read. Raises CheckpointError."""
        ...
