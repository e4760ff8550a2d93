"""moeserve's own checkpoint folder: config.json with the keys of [[layers]], and the tensors of each layer under its name.

    {layer}.gate.weight [E, H], {layer}.gate.bias [E], {layer}.gate.score_correction_bias [E], {layer}.gate.centroids [E, H]
    {layer}.experts.{e}.gate_up_proj [G, H], .down_proj [H, I], .gate_up_bias [G], .down_bias [H], or the state dict of a module
    {layer}.shared_expert.…           as an expert
    {layer}.mixer.weight [1 or 2, H], {layer}.mixer.bias [1 or 2]

E experts, H hidden size, I intermediate size, G = 2I when the activation is gated, else I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from moeserve.api.tensors import FLOAT_DTYPES
from moeserve.checkpoints.described import expert_bytes, intermediate_sizes, spec_of
from moeserve.checkpoints.json_file import read_json
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.checkpoints.trust import check_trusted
from moeserve.config import Dtype, LayerConfig, LayerSpec
from moeserve.errors import CheckpointError
from moeserve.experts import Expert, ExpertShard, FeedForward, ModuleExpert, is_gated, make_module, module_bytes
from moeserve.gating import Mixer, Router

#: what config.json says in `model_type`
MODEL_TYPE = "moeserve"


class NamedTensors(Protocol):
    """Tensors by the names above; a tensor is read when asked for."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor, which must have `shape`, cast to `dtype`; finite. Raises CheckpointError naming the file."""
        ...

    def files_below(self, prefix: str) -> Sequence[Path]:
        """Files that hold the tensors below a module, and those that describe the folder."""
        ...


@dataclass(frozen=True)
class NativeLayer:
    """One layer that `layer` describes, of tensors named as above, wherever they are."""

    spec: LayerSpec
    layer: LayerConfig
    files: NamedTensors

    def files_read(self) -> Sequence[Path]:
        return self.files.files_below(self.spec.name)

    @property
    def held_as(self) -> str:
        return self.spec.quantized_to or self.spec.dtype

    @property
    def has_router_bias(self) -> bool:
        return f"{self.spec.name}.gate.bias" in self.files

    @property
    def has_selection_bias(self) -> bool:
        return f"{self.spec.name}.gate.score_correction_bias" in self.files

    def router(self) -> Router:
        experts, hidden = self.spec.num_experts, self.spec.hidden_size
        return Router(
            self._read("gate.weight", (experts, hidden), torch.float32),
            self.spec.gating,
            bias=self._if_there("gate.bias", (experts,)),
            score_correction_bias=self._if_there("gate.score_correction_bias", (experts,)),
            centroids=self._if_there("gate.centroids", (experts, hidden)),
        )

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        return [self._expert(shard) for shard in shards]

    def shared_expert(self) -> Expert | None:
        shared = self.layer.shared_expert
        if shared is None:
            return None
        if shared.expert is not None:
            return self._module("shared_expert", shared.expert, shared.expert_args)
        return self._feed_forward("shared_expert", shared.intermediate_size or 0, ExpertShard(0))

    def mixer(self) -> Mixer | None:
        if self.spec.shared_mixing is None:
            return None
        if self.spec.shared_mixing in ("add", "average"):
            return Mixer(self.spec.shared_mixing)
        rows = 2 if self.spec.shared_mixing == "residual" else 1
        weight = self._read("mixer.weight", (rows, self.spec.hidden_size), torch.float32)
        return Mixer(self.spec.shared_mixing, weight, self._if_there("mixer.bias", (rows,)))

    def nbytes(self, shard: ExpertShard) -> int:
        if self.spec.module is not None:
            return module_bytes(self.spec.module, self.spec.module_args[shard.expert], self._dtype)
        return expert_bytes(self.spec, intermediate_sizes(self.layer)[shard.expert], shard)

    def shared_nbytes(self) -> int:
        shared = self.layer.shared_expert
        if shared is None:
            return 0
        if shared.expert is not None:
            return module_bytes(shared.expert, shared.expert_args, self._dtype)
        return expert_bytes(self.spec, shared.intermediate_size or 0, ExpertShard(0))

    @property
    def _dtype(self) -> torch.dtype:
        return FLOAT_DTYPES[self.spec.dtype]

    def _expert(self, shard: ExpertShard) -> Expert:
        key = f"experts.{shard.expert}"
        if self.spec.module is not None:
            assert shard.of == 1, "modules are not split: checked when they are placed"
            return self._module(key, self.spec.module, self.spec.module_args[shard.expert])
        return self._feed_forward(key, intermediate_sizes(self.layer)[shard.expert], shard)

    def _feed_forward(self, key: str, size: int, shard: ExpertShard) -> FeedForward:
        spec = self.spec
        rows = size * (2 if is_gated(spec.activation) else 1)
        whole = FeedForward(
            spec.activation,
            self._read(f"{key}.gate_up_proj", (rows, spec.hidden_size)),
            self._read(f"{key}.down_proj", (spec.hidden_size, size)),
            self._read(f"{key}.gate_up_bias", (rows,)) if spec.bias else None,
            self._read(f"{key}.down_bias", (spec.hidden_size,)) if spec.bias else None,
        )
        return split_feed_forward(whole, shard)

    def _module(self, key: str, path: str, args: Mapping[str, Any]) -> ModuleExpert:
        module = make_module(path, dict(args), "cpu")
        state = {name: self._read(f"{key}.{name}", tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        return ModuleExpert(module, self._dtype)

    def _if_there(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        return self._read(name, shape, torch.float32) if f"{self.spec.name}.{name}" in self.files else None

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.files.read(f"{self.spec.name}.{name}", shape, dtype or self._dtype)


def split_feed_forward(whole: FeedForward, shard: ExpertShard) -> FeedForward:
    """The shard's part of an expert."""
    if shard.of == 1:
        return whole
    channels, parts = shard.span(whole.down_proj.shape[1]), 2 if is_gated(whole.activation) else 1

    def rows(projected: torch.Tensor) -> torch.Tensor:
        return torch.cat([part[channels] for part in projected.chunk(parts)])

    return FeedForward(
        whole.activation,
        rows(whole.gate_up_proj),
        whole.down_proj[:, channels].contiguous(),
        None if whole.gate_up_bias is None else rows(whole.gate_up_bias),
        None if whole.down_bias is None else whole.down_bias * shard.is_first,
    )


def native_layers(folder: Path, dtype: Dtype | None, trusted: Sequence[str]) -> list[NativeLayer]:
    """All layers of the folder; reads config.json and file headers, no weights.

    `trusted`: packages whose classes the folder may name. Raises CheckpointError naming the file or the key, ConfigError for others.
    """
    where = folder / "config.json"
    described = read_json(where).get("layers")
    if not isinstance(described, list) or not described:
        raise CheckpointError(f"{where}: layers must be a list of at least one table with the keys of [[layers]]")
    layers = [_described(where, index, table) for index, table in enumerate(described)]
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{where}: layer names must differ, got {names}")
    for layer in layers:
        check_trusted(str(layer.name), layer, trusted)
    files = SafetensorsFolder(folder)
    found = [_layer(layer, files, dtype) for layer in layers]
    for native in found:
        _reject_unread(native, files, [other.spec.name for other in found])
    return found


def _described(where: Path, index: int, table: Any) -> LayerConfig:
    try:
        layer = LayerConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("layers", index, *first["loc"])))
        raise CheckpointError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    for key in ("name", "hidden_size", "num_experts", *(("intermediate_size",) if layer.expert is None else ())):
        if getattr(layer, key) is None:
            raise CheckpointError(f"{where}: layers.{index}.{key} is missing")
    return layer


def _layer(layer: LayerConfig, files: SafetensorsFolder, dtype: Dtype | None) -> NativeLayer:
    spec = spec_of(str(layer.name), layer, dtype or "float32")
    if dtype is not None:
        return NativeLayer(spec, layer, files)
    tensor = (
        "down_proj" if layer.expert is None else next(iter(make_module(layer.expert, dict(spec.module_args[0]), "meta").state_dict()), None)
    )
    stored = files.dtype(f"{layer.name}.gate.weight" if tensor is None else f"{layer.name}.experts.0.{tensor}")
    return NativeLayer(spec_of(str(layer.name), layer, stored), layer, files)


def _reject_unread(layer: NativeLayer, files: SafetensorsFolder, names: Sequence[str]) -> None:
    """A tensor that is not read tells of another layer than config.json; those of modules may have any name. names: of all layers."""
    spec, own, shared = layer.spec, f"{layer.spec.name}.", layer.layer.shared_expert
    parts = ("gate_up_proj", "down_proj", *(("gate_up_bias", "down_bias") if spec.bias else ()))
    read = {f"gate.{part}" for part in ("weight", "bias", "score_correction_bias", "centroids")}
    read |= {f"experts.{expert}.{part}" for expert in range(spec.num_hosted_experts) for part in parts}
    read |= {f"shared_expert.{part}" for part in parts} if shared is not None else set()
    read |= {"mixer.weight", "mixer.bias"} if spec.shared_mixing in ("sigmoid", "residual") else set()
    of_modules = tuple(prefix for prefix, module in (("experts.", spec.module), ("shared_expert.", spec.shared_module)) if module)
    of_others = tuple(f"{name}." for name in names if name.startswith(own))
    for name in files.below(spec.name):
        if not (name.removeprefix(own) in read or name.removeprefix(own).startswith(of_modules) or name.startswith(of_others)):
            raise CheckpointError(
                f"{files.folder}: tensor {name} belongs to an MoE layer, but config.json describes one that does not read it"
            )
