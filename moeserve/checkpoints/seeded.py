"""A random layer that is the same everywhere: every tensor of every expert has a generator of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeserve.config import LayerSpec
from moeserve.experts import ExpertWeights, is_gated
from moeserve.tensors import FLOAT_DTYPES


@dataclass(frozen=True)
class SeededLayer:
    """Weights drawn from N(0, 1 / fan_in), biases from N(0, 0.01); the same seed gives the same layer on any host."""

    spec: LayerSpec
    seed: int

    def gate(self) -> torch.Tensor:
        """[E, H] float32."""
        return self._draw("gate", (self.spec.num_experts, self.spec.hidden_size), self.spec.hidden_size**-0.5)

    def experts(self, expert_ids: Sequence[int]) -> ExpertWeights:
        """The given experts, stacked in that order, in the spec's dtype."""
        hidden, intermediate = self.spec.hidden_size, self.spec.intermediate_size
        projected = intermediate * (2 if is_gated(self.spec.activation) else 1)

        def stack(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
            out = torch.empty(len(expert_ids), *shape, dtype=FLOAT_DTYPES[self.spec.dtype])
            for slot, expert in enumerate(expert_ids):
                out[slot] = self._draw(f"{name}.{expert}", shape, std)
            return out

        return ExpertWeights(
            gate_up_proj=stack("gate_up_proj", (projected, hidden), hidden**-0.5),
            down_proj=stack("down_proj", (hidden, intermediate), intermediate**-0.5),
            gate_up_bias=stack("gate_up_bias", (projected,), 0.1) if self.spec.bias else None,
            down_bias=stack("down_bias", (hidden,), 0.1) if self.spec.bias else None,
        )

    def _draw(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator) * std
