"""A random layer that is the same everywhere: every tensor of every expert has a generator of its own.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.checkpoints.described import expert_bytes
from moeserve.config import LayerSpec, SharedExpertConfig
from moeserve.experts import Expert, ExpertShard, FeedForward, ModuleExpert, is_gated, make_module, module_bytes
from moeserve.gating import Mixer, Router


@dataclass(frozen=True)
class SeededLayer:
    """Weights drawn from N(0, 1 / fan_in), biases from N(0, 0.01); the same seed gives the same layer on any host.

    intermediate_sizes: I of each expert that computes.
    """

    spec: LayerSpec
    seed: int
    intermediate_sizes: Sequence[int] = ()
    shared: SharedExpertConfig | None = None
    has_router_bias: bool = field(default=False, init=False)
    has_selection_bias: bool = field(default=False, init=False)

    def files_read(self) -> Sequence[Path]:
        return ()

    @property
    def held_as(self) -> str:
        return self.spec.quantized_to or self.spec.dtype

    def router(self) -> Router:
        return Router(self._draw("gate", (self.spec.num_experts, self.spec.hidden_size), self.spec.hidden_size**-0.5), self.spec.gating)

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        return [self._expert(shard) for shard in shards]

    def shared_expert(self) -> Expert | None:
        if self.shared is None:
            return None
        if self.shared.expert is not None:
            return self._module("shared", self.shared.expert, self.shared.expert_args)
        return self._feed_forward("shared", self.shared.intermediate_size or 0, ExpertShard(0))

    def mixer(self) -> Mixer | None:
        if self.shared is None:
            return None
        rows = {"add": 0, "average": 0, "sigmoid": 1, "residual": 2}[self.shared.mixing]
        weight = self._draw("mixer", (rows, self.spec.hidden_size), self.spec.hidden_size**-0.5) if rows else None
        return Mixer(self.shared.mixing, weight)

    def nbytes(self, shard: ExpertShard) -> int:
        if self.spec.module is not None:
            return module_bytes(self.spec.module, self.spec.module_args[shard.expert], self._dtype)
        return expert_bytes(self.spec, self._size_of(shard), shard)

    def shared_nbytes(self) -> int:
        if self.shared is None:
            return 0
        if self.shared.expert is not None:
            return module_bytes(self.shared.expert, self.shared.expert_args, self._dtype)
        return expert_bytes(self.spec, self.shared.intermediate_size or 0, ExpertShard(0))

    @property
    def _dtype(self) -> torch.dtype:
        return FLOAT_DTYPES[self.spec.dtype]

    def _size_of(self, shard: ExpertShard) -> int:
        return self.intermediate_sizes[shard.expert]

    def _expert(self, shard: ExpertShard) -> Expert:
        if self.spec.module is not None:
            assert shard.of == 1, "modules are not split: checked when they are placed"
            return self._module(str(shard.expert), self.spec.module, self.spec.module_args[shard.expert])
        return self._feed_forward(str(shard.expert), self._size_of(shard), shard)

    def _feed_forward(self, key: str, intermediate_size: int, shard: ExpertShard) -> FeedForward:
        hidden, channels, spec = self.spec.hidden_size, shard.span(intermediate_size), self.spec
        parts = 2 if is_gated(spec.activation) else 1

        def split(projected: torch.Tensor) -> torch.Tensor:
            """Of [G] or [G, H], the channels of the shard."""
            part: torch.Tensor = projected.view(parts, intermediate_size, -1)[:, channels].flatten(0, 1)
            return part.reshape(-1, *projected.shape[1:]).to(self._dtype)

        gate_up = self._draw(f"gate_up_proj.{key}", (parts * intermediate_size, hidden), hidden**-0.5)
        down = self._draw(f"down_proj.{key}", (hidden, intermediate_size), intermediate_size**-0.5)
        gate_up_bias = down_bias = None
        if spec.bias:
            gate_up_bias = split(self._draw(f"gate_up_bias.{key}", (parts * intermediate_size,), 0.1))
            down_bias = self._draw(f"down_bias.{key}", (hidden,), 0.1).to(self._dtype) * shard.is_first
        return FeedForward(spec.activation, split(gate_up), down[:, channels].to(self._dtype).contiguous(), gate_up_bias, down_bias)

    def _module(self, key: str, path: str, args: Mapping[str, Any]) -> ModuleExpert:
        module = make_module(path, dict(args), "cpu")
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 100
            parameter.data = self._draw(f"module.{key}.{name}", tuple(parameter.shape), fan_in**-0.5)
        return ModuleExpert(module, self._dtype)

    def _draw(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32) * std
