"""What is configured to be served -> its layers, every open question answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from moeserve.checkpoints.deepspeed import deepspeed_layers, is_deepspeed
from moeserve.checkpoints.described import intermediate_sizes, spec_of
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.huggingface_folder import huggingface_layers
from moeserve.checkpoints.json_file import read_json
from moeserve.checkpoints.native import MODEL_TYPE, NativeLayer, native_layers
from moeserve.checkpoints.seeded import SeededLayer
from moeserve.checkpoints.source import LayerSource
from moeserve.config import GatingConfig, LayerConfig, LayerSpec, ServedModel
from moeserve.errors import CheckpointError, ConfigError, number_of
from moeserve.files import require_folder
from moeserve.gating.expert_groups import check_groups

StoredLayer = HuggingFaceLayer | NativeLayer
#: routings whose choices and weights no tensor of a gate decides
_WITHOUT_GATE: Final = ("caller", "hash", "random", "least_loaded")


def layer_sources(served: ServedModel) -> list[LayerSource]:
    """The served layers in order. Raises ConfigError or CheckpointError with one sentence; reads no weights."""
    sources: list[LayerSource] = []
    model = served.model
    if model.checkpoint is None:
        found: Sequence[SeededLayer | StoredLayer] = [_seeded(index, layer, served) for index, layer in enumerate(served.layers)]
    else:
        found = _read(model.checkpoint, served)
    for layer in found:
        sources.append(replace(layer, spec=replace(layer.spec, kernel=model.kernel, deterministic=model.deterministic)))
    for source in sources:
        if source.spec.gating.top_k > source.spec.num_experts:
            raise ConfigError(
                f"layer {source.spec.name}: gating.top_k is {source.spec.gating.top_k}, "
                f"but it has {number_of(source.spec.num_experts, 'expert')}"
            )
        check_groups(source.spec.num_experts, source.spec.gating)
        if (source.spec.module or source.spec.shared_module) and source.spec.quantized_to is not None:
            raise ConfigError(
                f"model.quantization is {model.quantization!r}, but the experts of layer {source.spec.name} are modules; "
                f"allowed: only feed-forward experts are quantized"
            )
        if (source.spec.module or source.spec.shared_module) and served.store.spill is not None:
            raise ConfigError(
                f"store.spill is {served.store.spill!r}, but the experts of layer {source.spec.name} are modules, which may keep a state; "
                f"allowed: only feed-forward experts are read again"
            )
    return sources


def _seeded(index: int, layer: LayerConfig, served: ServedModel) -> SeededLayer:
    spec = spec_of(layer.name or f"layers.{index}", layer, served.model.dtype or "float32", served.model.quantization)
    return SeededLayer(spec, layer.seed, intermediate_sizes(layer), layer.shared_expert)


def _read(folder: Path, served: ServedModel) -> list[StoredLayer]:
    """The served layers of a folder, whatever that is."""
    try:
        require_folder(folder)
        return _stored(folder, served)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint folder {folder} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint folder {folder} cannot be read: {error.strerror}") from None


def _stored(folder: Path, served: ServedModel) -> list[StoredLayer]:
    """The served layers of a checkpoint, whoever wrote it, with what the configuration changes about them."""
    where, model = folder / "config.json", served.model
    found: Sequence[StoredLayer]
    is_native = where.is_file() and read_json(where).get("model_type") == MODEL_TYPE
    if model.family is not None and (is_native or is_deepspeed(folder)):
        raise ConfigError(f"model.family is {model.family!r}, but {folder} is no checkpoint of Hugging Face; allowed: unset")
    if is_deepspeed(folder):
        return _wanted(deepspeed_layers(folder, model.dtype, model.quantization, served.layers), model.layers)
    if is_native:
        found = native_layers(folder, model.dtype, model.trusted_modules)
    else:
        found = huggingface_layers(folder, model.dtype, model.family)
    sources = [_overlaid(source, served) for source in _wanted(found, model.layers)]
    _reject_unknown_names(served.layers, [source.spec.name for source in sources])
    return sources


def _wanted(found: Sequence[StoredLayer], wanted: Sequence[int | str] | None) -> list[StoredLayer]:
    if wanted is None:
        return list(found)
    by_name = {source.spec.name: source for source in found}
    for layer in wanted:
        if layer not in by_name and layer not in range(len(found)):
            raise ConfigError(f"model.layers: the checkpoint has no MoE layer {layer!r}; it has 0..{len(found) - 1}: {', '.join(by_name)}")
    return [source for index, source in enumerate(found) if index in wanted or source.spec.name in wanted]


def _overlaid(source: StoredLayer, served: ServedModel) -> StoredLayer:
    """Settings that were written down win over what the checkpoint says; those of a nameless entry apply to every layer."""
    gating: dict[str, Any] = source.spec.gating.model_dump()
    for change in served.layers:
        if change.name is None or change.name == source.spec.name:
            _reject_sizes(change, source.spec)
            gating.update(change.gating.model_dump(exclude_unset=True))
    try:
        spec = replace(source.spec, gating=GatingConfig.model_validate(gating), quantization=served.model.quantization)
    except ValidationError as error:
        raise ConfigError(f"layer {source.spec.name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if isinstance(source, HuggingFaceLayer) and not source.layout.router and spec.gating.routing not in _WITHOUT_GATE:
        raise ConfigError(
            f"layer {spec.name}: gating.routing is {spec.gating.routing!r}, but its gate stays with the model; "
            f"allowed: {', '.join(_WITHOUT_GATE)}"
        )
    return replace(source, spec=spec)


def _reject_sizes(change: LayerConfig, spec: LayerSpec) -> None:
    fixed = change.model_fields_set - {"name", "gating", "resilience"}
    if fixed:
        raise ConfigError(
            f"layers.{sorted(fixed)[0]} cannot be set for {spec.name}: the checkpoint decides it; only gating and resilience can be changed"
        )


def _reject_unknown_names(changes: Sequence[LayerConfig], names: Sequence[str]) -> None:
    for change in changes:
        if change.name is not None and change.name not in names:
            raise ConfigError(f"layers.name {change.name!r} is not a served layer; served: {', '.join(names)}")
