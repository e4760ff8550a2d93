"""The MoE layers of a Hugging Face folder: config.json + safetensors, as downloaded.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeserve.checkpoints.families import FAMILIES, Family, Layout
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder, read_json
from moeserve.config import Activation, Dtype, LayerSpec
from moeserve.errors import CheckpointError
from moeserve.experts import Expert, ExpertShard, FeedForward, feed_forward_bytes
from moeserve.gating import Mixer, Router
from moeserve.tensors import FLOAT_DTYPES

_ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


@dataclass(frozen=True)
class HuggingFaceLayer:
    """One MoE layer of the folder."""

    spec: LayerSpec
    layout: Layout
    index: int
    files: SafetensorsFolder

    def router(self) -> Router:
        gate = self.files.read(self._name(self.layout.router), (self.spec.num_experts, self.spec.hidden_size), torch.float32)
        return Router(gate, self.spec.gating)

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        return [self._expert(shard) for shard in shards]

    def shared_expert(self) -> Expert | None:
        return None

    def mixer(self) -> Mixer | None:
        return None

    def nbytes(self, shard: ExpertShard) -> int:
        spec = self.spec
        return feed_forward_bytes(spec.hidden_size, spec.intermediate_size, spec.activation, spec.bias, FLOAT_DTYPES[spec.dtype], shard)

    def shared_nbytes(self) -> int:
        return 0

    def _expert(self, shard: ExpertShard) -> FeedForward:
        count, hidden, intermediate = self.spec.num_experts, self.spec.hidden_size, self.spec.intermediate_size
        expert, channels = shard.expert, shard.span(intermediate)
        if self._name(self.layout.gate_up) in self.files:
            gate, up = self._read(self.layout.gate_up, (count, 2 * intermediate, hidden), expert).split(intermediate)
            down = self._read(self.layout.stacked_down, (count, hidden, intermediate), expert)
        else:
            gate = self._read(self.layout.gate.format(expert=expert), (intermediate, hidden))
            up = self._read(self.layout.up.format(expert=expert), (intermediate, hidden))
            down = self._read(self.layout.down.format(expert=expert), (hidden, intermediate))
        return FeedForward(self.spec.activation, torch.cat([gate[channels], up[channels]]), down[:, channels].contiguous())

    def _name(self, name: str) -> str:
        return f"{self.layout.prefix.format(index=self.index)}.{name}"

    def _read(self, name: str, shape: tuple[int, ...], expert: int | None = None) -> torch.Tensor:
        return self.files.read(self._name(name), shape, FLOAT_DTYPES[self.spec.dtype], expert)


def huggingface_layers(folder: Path, dtype: Dtype | None) -> list[HuggingFaceLayer]:
    """All MoE layers of the folder, in model order; reads config.json and file headers, no weights.

    `dtype` casts on load; None keeps what is stored. Raises CheckpointError naming the file or the key.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    config = read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {model_type}; supported: {', '.join(sorted(FAMILIES))}")
    family, files = FAMILIES[model_type], SafetensorsFolder(folder)
    for key in ("num_hidden_layers", "hidden_size", family.intermediate_key, family.num_experts_key(config), "num_experts_per_tok"):
        if type(config.get(key)) is not int or config[key] < 1:
            given = repr(config[key]) if key in config else "missing"
            raise CheckpointError(f"{folder / 'config.json'}: {key} must be a positive whole number, but is {given}")
    indexes = [index for index in range(config["num_hidden_layers"]) if family.is_moe_layer(config, index)]
    if not indexes:
        raise CheckpointError(f"{folder / 'config.json'}: none of the {config['num_hidden_layers']} layers is an MoE layer")
    return [_layer(family, config, index, files, dtype) for index in indexes]


def _layer(family: Family, config: dict[str, Any], index: int, files: SafetensorsFolder, dtype: Dtype | None) -> HuggingFaceLayer:
    activation = _ACTIVATIONS.get(config.get("hidden_act", "silu"))
    if activation is None:
        raise CheckpointError(
            f"{files.folder / 'config.json'}: hidden_act {config['hidden_act']!r} is not one of {', '.join(_ACTIVATIONS)}"
        )
    layout = _layout(family, index, files)
    spec = LayerSpec(
        name=family.layer_name.format(index=index),
        hidden_size=config["hidden_size"],
        intermediate_size=config[family.intermediate_key],
        num_experts=config[family.num_experts_key(config)],
        activation=activation,
        bias=False,
        dtype=dtype or _stored_dtype(layout, index, files),
        gating=family.gating(config),
    )
    return HuggingFaceLayer(spec, layout, index, files)


def _layout(family: Family, index: int, files: SafetensorsFolder) -> Layout:
    for layout in family.layouts:
        prefix = layout.prefix.format(index=index)
        if f"{prefix}.{layout.router}" in files:
            return layout
    expected = " or ".join(f"{layout.prefix.format(index=index)}.{layout.router}" for layout in family.layouts)
    raise CheckpointError(f"{files.folder}: tensor {expected} is missing")


def _stored_dtype(layout: Layout, index: int, files: SafetensorsFolder) -> Dtype:
    prefix = layout.prefix.format(index=index)
    candidates = (f"{prefix}.{layout.gate_up}", f"{prefix}.{layout.gate.format(expert=0)}")
    for name in candidates:
        if name in files:
            return files.dtype(name)
    raise CheckpointError(f"{files.folder}: tensor {candidates[1]} is missing")
