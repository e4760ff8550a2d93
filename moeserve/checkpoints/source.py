"""Where one layer's weights come from, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moeserve.config import LayerSpec
from moeserve.experts import Expert, ExpertBank, ExpertShard
from moeserve.gating import Mixer, Router
from moeserve.tensors import FLOAT_DTYPES

_CPU = torch.device("cpu")


class LayerSource(Protocol):
    """E experts, H hidden size. Nothing is read before one of the methods is called; all raise CheckpointError."""

    @property
    def spec(self) -> LayerSpec: ...

    def router(self) -> Router:
        """The gate with all that it owns."""
        ...

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        """The given experts, or shards of them, in that order, in the spec's dtype; nothing else is read."""
        ...

    def shared_expert(self) -> Expert | None:
        """The expert that every token goes to; None unless spec.shared_mixing says how it is added."""
        ...

    def mixer(self) -> Mixer | None:
        """How the shared expert is added."""
        ...

    def nbytes(self, shard: ExpertShard) -> int:
        """Bytes of weights of a shard, known without reading it."""
        ...

    def shared_nbytes(self) -> int:
        """Bytes of the shared expert, 0 without one."""
        ...


def load_bank(source: LayerSource, shards: Sequence[ExpertShard], device: torch.device = _CPU) -> ExpertBank:
    """What one host holds of a layer, in slot order: the given shards, and after them the shared expert. Raises CheckpointError."""
    spec = source.spec
    return ExpertBank(
        source.experts(shards),
        spec.hidden_size,
        FLOAT_DTYPES[spec.dtype],
        shared=source.shared_expert(),
        device=device,
        scale_inputs=spec.gating.scale_inputs,
    )


def bank_bytes(source: LayerSource, shards: Sequence[ExpertShard]) -> int:
    """Bytes that `load_bank` will hold."""
    return sum(map(source.nbytes, shards)) + (source.shared_nbytes() if shards else 0)
