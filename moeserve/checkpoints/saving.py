"""Layers -> moeserve's own checkpoint folder, which checkpoints/native.py reads.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeserve.api.tensors import FLOAT_DTYPES, dtype_name
from moeserve.checkpoints.json_file import read_json
from moeserve.checkpoints.native import MODEL_TYPE
from moeserve.checkpoints.safetensors_folder import INDEX
from moeserve.config import LayerConfig, LayerSpec
from moeserve.errors import ConfigError
from moeserve.experts import Expert, FeedForward, ModuleExpert, QuantizedFeedForward
from moeserve.gating import Mixer, Router


@dataclass(frozen=True)
class SavedLayer:
    """A layer as it goes into a folder: `config` has a name, `tensors` are named within the layer."""

    config: LayerConfig
    tensors: Mapping[str, torch.Tensor]


def save(folder: str | Path, layers: Sequence[SavedLayer]) -> None:
    """Write the folder; `moeserve serve FOLDER` and `MoELayer.from_checkpoint(FOLDER)` take it.

    What was saved there before is replaced. Raises ConfigError when the folder holds another kind of checkpoint, names are not unique,
    or a tensor is not of float32, float16 or bfloat16.
    """
    folder = Path(folder)
    names = [layer.config.name for layer in layers]
    if not layers or len(set(names)) != len(names):
        raise ConfigError(f"{folder}: layers to save must have different names, got {names}")
    tensors = {f"{layer.config.name}.{name}": tensor for layer in layers for name, tensor in layer.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES.values():
            raise ConfigError(f"{name} is {dtype_name(tensor.dtype)}; allowed in a checkpoint: {', '.join(FLOAT_DTYPES)}")
    where = folder / "config.json"
    if where.exists() and read_json(where).get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{folder} holds a checkpoint of another kind: save to a folder of its own")
    if (folder / INDEX).exists():
        raise ConfigError(f"{folder} has {INDEX}, which says that tensors are in other files: save to a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory, as the experts of one module may.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    described = [_keys(layer.config) for layer in layers]
    where.write_text(json.dumps({"model_type": MODEL_TYPE, "layers": described}, indent=2) + "\n", encoding="utf-8")


def saved_experts(name: str, spec: LayerSpec, router: Router, mixer: Mixer | None, experts: Sequence[Expert]) -> SavedLayer:
    """A layer as it runs: `experts` are those that compute, and after them the shared one. Raises ConfigError for other kinds."""
    tensors = {
        **_named("gate", _of_router(router)),
        **_named("mixer", {} if mixer is None else {"weight": mixer.weight, "bias": mixer.bias}),
    }
    if router.token_experts is not None:
        raise ConfigError(f"layer {name}: its gate has a table of token ids, which a folder of moeserve cannot hold")
    sizes = []
    for number, expert in enumerate(experts):
        is_shared = number >= spec.num_hosted_experts
        if isinstance(expert, QuantizedFeedForward):
            raise ConfigError(
                f'layer {name}: experts in few bits cannot be saved; allowed: those of a layer loaded with quantization = "none"'
            )
        if not isinstance(expert, FeedForward if is_shared or spec.module is None else ModuleExpert):
            raise ConfigError(f"layer {name}: an expert is a {type(expert).__name__}, which a folder of moeserve cannot hold here")
        if isinstance(expert, FeedForward) and (expert.activation, expert.down_bias is not None) != (spec.activation, spec.bias):
            raise ConfigError(
                f"layer {name}: its shared expert differs in activation or biases from the others, which a folder of moeserve cannot hold"
            )
        own = expert.tensors if isinstance(expert, FeedForward) else expert.module.state_dict()
        tensors |= prefixed("shared_expert" if is_shared else f"experts.{number}", own)
        sizes += [expert.down_proj.shape[1]] if isinstance(expert, FeedForward) else []
    keys: dict[str, Any] = {"expert": spec.module, "expert_args": list(spec.module_args)} if spec.module else {}
    if spec.module is None:
        keys["intermediate_size"] = sizes[: spec.num_hosted_experts]
    if mixer is not None:
        keys["shared_expert"] = {"intermediate_size": sizes[-1], "mixing": mixer.mixing}
    same = ("hidden_size", "num_experts", "identity_experts", "zero_experts", "activation", "bias", "gating")
    config = LayerConfig(name=name, **{key: getattr(spec, key) for key in same}, **keys)
    return SavedLayer(config, tensors)


def _of_router(router: Router) -> dict[str, torch.Tensor | None]:
    centroids = None if router.centroids is router.gate else router.centroids
    return {"weight": router.gate, "bias": router.bias, "score_correction_bias": router.score_correction_bias, "centroids": centroids}


def _named(prefix: str, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return prefixed(prefix, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, their names below `prefix`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _keys(config: LayerConfig) -> dict[str, Any]:
    """Only what is not at its default, so that the file says what the layer is."""
    keys = config.model_dump(exclude_defaults=True, mode="json")
    # Defaults of another version must not change what a layer does: the gate is written out.
    return {**keys, "gating": config.gating.model_dump(mode="json")}
