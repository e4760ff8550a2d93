"""The MoE layers of a DeepSpeed checkpoint, as `save_checkpoint` of DeepSpeed 0.19.8 writes them.

    layer_{L}_expert_{e}_mp_rank_00_model_states.pt   {layer}.deepspeed_moe.experts.deepspeed_experts.{e}.… of one expert
    mp_rank_00_model_states.pt                        in `module`: {layer}.deepspeed_moe.gate.wg.weight [E, H], and of residual layers
                                                      {layer}.mlp.…, {layer}.coefficient.weight [2, H], {layer}.coefficient.bias [2]

The second may be nested, and hold anything beside: see deepspeed_rest.py. The files are pickles, of which nothing is imported or run.
E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moeserve.checkpoints.deepspeed_files import DeepSpeedFolder, DeepSpeedTensors
from moeserve.checkpoints.described import spec_of
from moeserve.checkpoints.native import NativeLayer
from moeserve.config import Dtype, LayerConfig, Quantization
from moeserve.errors import CheckpointError, ConfigError
from moeserve.experts import is_gated, make_module

#: what the files do not say, and [[layers]] does
TOLD = {"name", "activation", "expert", "expert_args", "gating", "resilience"}
_PARTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
_WEIGHT = re.compile(r"(.*?)\.?weight")


def is_deepspeed(folder: Path) -> bool:
    """Whether there are files of experts in it, or in the folder that its `latest` names."""
    return DeepSpeedFolder.find(folder) is not None


def deepspeed_layers(
    folder: Path, dtype: Dtype | None, quantization: Quantization | None, told: Sequence[LayerConfig]
) -> list[NativeLayer]:
    """All MoE layers of the folder, in model order; reads names and sizes, no weights.

    told: the entries of [[layers]]; a nameless one is about every layer. Each layer needs gating.top_k, and activation or expert and
    expert_args unless its experts are swiglu. Raises CheckpointError naming the file, or ConfigError naming the key.
    """
    found = DeepSpeedFolder.find(folder)
    assert found is not None, "asked before"
    names = [found.name(number) for number in range(found.num_layers)]
    for entry in told:
        surplus = sorted(entry.model_fields_set - TOLD)
        if surplus:
            raise ConfigError(
                f"layers.{surplus[0]} cannot be set: the checkpoint of DeepSpeed decides it; allowed: {', '.join(sorted(TOLD))}"
            )
        if entry.name is not None and entry.name not in names:
            raise ConfigError(f"layers.name {entry.name!r} is not a layer of {folder}; it has {', '.join(names)}")
    layers = [_layer(found, number, dtype, _told(names[number], told)) for number in range(found.num_layers)]
    return [replace(layer, spec=replace(layer.spec, quantization=quantization)) for layer in layers]


def _told(name: str, told: Sequence[LayerConfig]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    gating: dict[str, Any] = {}
    for entry in told:
        if entry.name in {None, name}:
            keys |= entry.model_dump(exclude_unset=True, exclude={"gating", "name", "resilience"})
            gating |= entry.gating.model_dump(exclude_unset=True)
    if "top_k" not in gating:
        raise ConfigError(
            f"layer {name}: a checkpoint of DeepSpeed does not say how it routes: give layers.gating.top_k, its k, and the rest"
        )
    return {**keys, "name": name, "gating": gating}


def _layer(folder: DeepSpeedFolder, number: int, dtype: Dtype | None, told: Mapping[str, Any]) -> NativeLayer:
    name, state = str(told["name"]), folder.expert(number, 0)
    experts, hidden_size = folder.gate_shape(number)
    if experts != folder.num_experts(number):
        raise CheckpointError(f"{folder.path}: layer {name} has files of {folder.num_experts(number)} experts, its gate has {experts}")
    keys: dict[str, Any] = {**told, "hidden_size": hidden_size, "num_experts": experts}
    own: dict[str, Any] = {"expert": told.get("expert"), "expert_args": told.get("expert_args", {})}
    parts: dict[str, str] = {}
    if own["expert"] is None:
        parts, own = _projections(folder, number, _checked(keys), state), {}
        own["intermediate_size"] = state[parts["down_proj"]].shape[1]
        keys |= own | {"bias": "down_bias" in parts}
    else:
        args = own["expert_args"]
        own["expert_args"] = args[0] if isinstance(args, tuple) else args
        made = make_module(own["expert"], own["expert_args"], "meta").state_dict()
        if set(made) != set(state):
            odd = sorted(set(made) ^ set(state))[0]
            raise CheckpointError(f"{folder.file(number, 0)}: an expert {own['expert']!r} and the file do not both have the tensor {odd}")
    if folder.has_residual(number):
        keys["shared_expert"] = {**own, "mixing": "residual"}
    layer = _checked(keys)
    stored = folder.dtype(number)
    return NativeLayer(spec_of(name, layer, dtype or stored), layer, DeepSpeedTensors(folder, number, name, parts))


def _checked(keys: Mapping[str, Any]) -> LayerConfig:
    try:
        return LayerConfig.model_validate(keys)
    except ValidationError as error:
        raise ConfigError(f"layer {keys['name']}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _projections(folder: DeepSpeedFolder, number: int, layer: LayerConfig, state: Mapping[str, Any]) -> dict[str, str]:
    """Our names of the tensors of an expert -> theirs: two weights in order, and their biases."""
    found = [match[1] for name, tensor in state.items() if (match := _WEIGHT.fullmatch(name)) and tensor.dim() == 2]
    names = [f"{each}.{kind}".lstrip(".") for kind in ("weight", "bias") for each in found]
    hidden_size, rows = layer.hidden_size, 2 if is_gated(layer.activation) else 1
    if len(found) == 2 and set(state) in (set(names), set(names[:2])):
        up, down = state[names[0]], state[names[1]]
        if up.shape[1] == down.shape[0] == hidden_size and up.shape[0] == rows * down.shape[1]:
            return dict(zip(_PARTS, names if len(state) == 4 else names[:2], strict=False))
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    raise CheckpointError(
        f"{folder.file(number, 0)}: an expert of {shapes} is not two projections with {layer.activation} between them: "
        "set layers.activation, or layers.expert to its class and layers.expert_args"
    )
