"""Service configuration -> the layers to serve, every open question answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.huggingface_folder import huggingface_layers
from moeserve.checkpoints.seeded import SeededLayer
from moeserve.checkpoints.source import LayerSource
from moeserve.config import GatingConfig, LayerConfig, LayerSpec, ServiceConfig
from moeserve.errors import ConfigError
from moeserve.experts import check_module


def layer_sources(config: ServiceConfig) -> list[LayerSource]:
    """The served layers in order. Raises ConfigError or CheckpointError with one sentence; reads no weights."""
    sources: list[LayerSource] = []
    if config.model.checkpoint is None:
        sources.extend(_seeded(index, layer, config) for index, layer in enumerate(config.layers))
    else:
        found = huggingface_layers(config.model.checkpoint, config.model.dtype)
        sources.extend(_overlaid(source, config) for source in _wanted(found, config.model.layers))
        _reject_unknown_names(config.layers, [source.spec.name for source in sources])
    for source in sources:
        if source.spec.gating.top_k > source.spec.num_experts:
            raise ConfigError(
                f"layer {source.spec.name}: gating.top_k is {source.spec.gating.top_k}, but it has {source.spec.num_experts} experts"
            )
        if source.spec.module is not None and config.placement.tensor_parallel > 1:
            raise ConfigError(
                f"placement.tensor_parallel must be 1: the experts of layer {source.spec.name} are modules, which cannot be split"
            )
        if source.spec.module is not None and config.model.quantization is not None:
            raise ConfigError(
                f"model.quantization is {config.model.quantization!r}, but the experts of layer {source.spec.name} are modules; "
                f"allowed: only feed-forward experts are quantized"
            )
    return sources


def _seeded(index: int, layer: LayerConfig, config: ServiceConfig) -> SeededLayer:
    assert layer.hidden_size and layer.num_experts, "checked by ServiceConfig"
    computing = layer.num_experts - layer.identity_experts - layer.zero_experts
    sizes = layer.intermediate_size
    sizes = sizes if isinstance(sizes, tuple) else (sizes or 0,) * computing
    spec = LayerSpec(
        name=layer.name or f"layers.{index}",
        hidden_size=layer.hidden_size,
        intermediate_size=max(sizes),
        num_experts=layer.num_experts,
        activation=layer.activation,
        bias=layer.bias,
        dtype=config.model.dtype or "float32",
        gating=layer.gating,
        module=layer.expert,
        identity_experts=layer.identity_experts,
        zero_experts=layer.zero_experts,
        shared_mixing=None if layer.shared_expert is None else layer.shared_expert.mixing,
        quantization=config.model.quantization,
    )
    if layer.expert is not None:
        check_module(layer.expert, layer.expert_args, layer.hidden_size)
    return SeededLayer(spec, layer.seed, sizes, layer.expert_args, layer.shared_expert)


def _wanted(found: Sequence[HuggingFaceLayer], wanted: Sequence[int | str] | None) -> list[HuggingFaceLayer]:
    if wanted is None:
        return list(found)
    by_name = {source.spec.name: source for source in found}
    for layer in wanted:
        if layer not in by_name and layer not in range(len(found)):
            raise ConfigError(f"model.layers: the checkpoint has no MoE layer {layer!r}; it has 0..{len(found) - 1}: {', '.join(by_name)}")
    return [source for index, source in enumerate(found) if index in wanted or source.spec.name in wanted]


def _overlaid(source: HuggingFaceLayer, config: ServiceConfig) -> HuggingFaceLayer:
    """Settings that were written down win over what the checkpoint says; those of a nameless entry apply to every layer."""
    gating: dict[str, Any] = source.spec.gating.model_dump()
    for change in config.layers:
        if change.name is None or change.name == source.spec.name:
            _reject_sizes(change, source.spec)
            gating.update(change.gating.model_dump(exclude_unset=True))
    try:
        spec = replace(source.spec, gating=GatingConfig.model_validate(gating), quantization=config.model.quantization)
    except ValidationError as error:
        raise ConfigError(f"layer {source.spec.name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return replace(source, spec=spec)


def _reject_sizes(change: LayerConfig, spec: LayerSpec) -> None:
    fixed = change.model_fields_set - {"name", "gating"}
    if fixed:
        raise ConfigError(f"layers.{sorted(fixed)[0]} cannot be set for {spec.name}: the checkpoint decides it; only gating can be changed")


def _reject_unknown_names(changes: Sequence[LayerConfig], names: Sequence[str]) -> None:
    for change in changes:
        if change.name is not None and change.name not in names:
            raise ConfigError(f"layers.name {change.name!r} is not a served layer; served: {', '.join(names)}")
