"""config.json of a Hugging Face folder -> its MoE layers, with sizes and gate; reads no weights.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from moeserve.checkpoints.architectures import named_family
from moeserve.checkpoints.claims import check_claims
from moeserve.checkpoints.families import FAMILIES, family_of
from moeserve.checkpoints.family import Family, Layout
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.json_file import read_json
from moeserve.checkpoints.keys import Config, LastRead, is_whole, lookup, must_be, shown, table, whole
from moeserve.checkpoints.layer_tensors import check_dense, check_tensors, is_dense
from moeserve.checkpoints.quantization_config import read_scheme
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.config import Dtype, GatingConfig, LayerSpec
from moeserve.errors import CheckpointError, ConfigError
from moeserve.gating.expert_groups import check_groups

log = logging.getLogger(__name__)


def huggingface_layers(folder: Path, dtype: Dtype | None) -> list[HuggingFaceLayer]:
    """All MoE layers of the folder, in model order. Reads config.json and the index; a file's header only where there is no index,
    or neither `dtype` nor config.json tells the type.

    `dtype` casts on load; None takes what config.json says, else what is stored. A model that is not wholly what its `model_type` says
    is served as the class that `architectures` names, if it is wholly that. Raises CheckpointError naming the file or the key.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    path = folder / "config.json"
    config = read_json(path)
    try:
        files = SafetensorsFolder(folder, read_scheme(folder, config))
        if is_dense(config, files):
            raise ValueError("none of the layers is an MoE layer: no key and no tensor is about experts")
        own = str(config.get("model_type"))
        family = family_of(own)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    other = named_family(config, FAMILIES)
    if other is None or FAMILIES[other] is family:
        return _read(own, config, files, dtype)
    return _agreed(own, other, config, files, dtype)


def _agreed(own: str, other: str, config: Mapping[str, Any], files: SafetensorsFolder, dtype: Dtype | None) -> list[HuggingFaceLayer]:
    """The layers when `model_type` and `architectures` name two families: those of the one that the rest of the folder fits."""
    named = f"architectures is {shown(config['architectures'])}"
    try:
        layers = _read(other, config, files, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; it was read as {other}, because {named}, though model_type is {own}") from None
    try:
        is_both = _read(own, config, files, dtype) == layers
    except CheckpointError as error:
        log.info("%s; served as %s, because %s", error, other, named)
        return layers
    if not is_both:
        raise CheckpointError(
            f"{files.folder / 'config.json'}: model_type is {own}, but {named}, and the folder fits both: correct the one that is wrong"
        )
    return layers


def _read(model_type: str, config: Mapping[str, Any], files: SafetensorsFolder, dtype: Dtype | None) -> list[HuggingFaceLayer]:
    """The layers of a model of that type. Raises CheckpointError for what cannot be, or is something else."""
    path = files.folder / "config.json"
    family = family_of(model_type)
    section = LastRead(config)
    try:
        if family.section and config.get(family.section) is not None:
            section = LastRead(table(config, family.section))
        return _Model(family, section, files, dtype or _written_dtype(section, config)).layers(model_type)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:
        # What the functions of a family run into when a key holds another kind of value than it does in that family.
        raise CheckpointError(
            f"{path}: {section.key} is {shown(section.get(section.key))}, which no {model_type} model has there"
        ) from error


class _Model:
    """One reading of config.json. Raises ValueError with a sentence that names the key."""

    def __init__(self, family: Family, config: LastRead, files: SafetensorsFolder, dtype: Dtype | None) -> None:
        self._family = family
        self._config = config
        self._files = files
        self._dtype = dtype

    def layers(self, model_type: str) -> list[HuggingFaceLayer]:
        count = self._count = self._size(self._family.num_hidden_layers)
        layers = [self._layer(index, model_type) for index in range(count) if self._family.is_moe_layer(self._config, index)]
        if not layers:
            raise ValueError("none of the layers is an MoE layer")
        check_dense({*range(count)} - {layer.index for layer in layers}, self._files, self._family)
        return layers

    def _layer(self, index: int, model_type: str) -> HuggingFaceLayer:
        family, config = self._family, self._config
        sizes = {
            name: self._size(getattr(family, name), index)
            for name in ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok")
        }
        layout = self._layout(index)
        prefix, shared = layout.prefix.format(index=index), layout.shared_projections
        shared_size = self._shared_size() if self._has_any(prefix, shared.weights(1)) else 0
        identity_experts = self._identity_experts()
        spec = LayerSpec(
            name=family.layer_name.format(index=index),
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_experts=sizes["num_experts"] + identity_experts,
            activation=family.activation(config),
            bias=family.bias and self._has_any(prefix, layout.experts.biases(1)),
            dtype=self._dtype or self._files.dtype(f"{prefix}.{layout.experts.first}"),
            gating=GatingConfig(top_k=sizes["num_experts_per_tok"], **family.gating(config)),
            identity_experts=identity_experts,
            shared_mixing=family.shared_mixing if shared_size else None,
        )
        has_shared_bias = bool(family.shared_bias) and self._has_any(prefix, shared.biases(1))
        layer = HuggingFaceLayer(spec, layout, index, self._files, shared_size, has_shared_bias)
        check_claims(config, layer, family, model_type)
        check_tensors(layer, family)
        self._check_choices(spec)
        return layer

    def _shared_size(self) -> int:
        """Of a shared expert that the files have; 0 in a family that has none."""
        self._config.key = ""
        size, key = self._family.shared_size(self._config), self._config.key
        if key and not size:
            raise ValueError(f"{key} is {shown(self._config.get(key))}, but the files have a shared expert")
        return size

    def _identity_experts(self) -> int:
        key = self._family.identity_experts
        return whole(self._config, key, 0, at_least=0) if key else 0

    def _check_choices(self, spec: LayerSpec) -> None:
        if spec.gating.top_k > spec.num_experts:
            key = self._key(self._family.num_experts_per_tok)
            raise must_be(self._config, key, f"at most {spec.num_experts}, the number of experts")
        try:
            check_groups(spec.num_experts, spec.gating)
        except ConfigError as error:
            raise ValueError(f"n_group and topk_group do not fit: {error}") from None

    def _size(self, keys: tuple[str, ...], index: int | None = None) -> int:
        """Of a layer, which may have its own in a list of one for each."""
        key = self._key(keys)
        value = lookup(self._config, key)
        if isinstance(value, list) and index is not None and len(value) == self._count and all(is_whole(size, 1) for size in value):
            return int(value[index])
        if not is_whole(value, 1):
            per_layer = f", or a list of one for each of the {self._count} layers" if isinstance(value, list) and index is not None else ""
            raise must_be(self._config, key, f"a positive whole number{per_layer}")
        return int(value)

    def _key(self, keys: tuple[str, ...]) -> str:
        return next((key for key in keys if lookup(self._config, key) is not None), keys[0])

    def _layout(self, index: int) -> Layout:
        """The first whose tensors are there, or at least its router's; without the biases that are not there."""
        prefixes = {layout: layout.prefix.format(index=index) for layout in self._family.layouts}
        routed = [layout for layout, prefix in prefixes.items() if self._has_any(prefix, [layout.router])]
        if not routed:
            routers = (f"{prefix}.{layout.router}" for layout, prefix in prefixes.items())
            raise CheckpointError(f"{self._files.folder}: tensor {' or '.join(dict.fromkeys(routers))} is missing")
        layout = max(routed, key=lambda layout: sum(self._has_any(prefixes[layout], [name]) for name in layout.telling))
        biases = (layout.router_bias, layout.score_correction_bias)
        router_bias, selection_bias = (name if self._has_any(prefixes[layout], [name]) else "" for name in biases)
        return replace(layout, router_bias=router_bias, score_correction_bias=selection_bias)

    def _has_any(self, prefix: str, names: Iterable[str]) -> bool:
        return any(self._files.stored_as(f"{prefix}.{name}") for name in names)


def _written_dtype(*configs: Config) -> Dtype | None:
    """What config.json calls `dtype`, or `torch_dtype` before transformers 5; in the table of the language model, else beside it."""
    for config in configs:
        for key in ("dtype", "torch_dtype"):
            name = str(config.get(key)).removeprefix("torch.")
            if name in get_args(Dtype):
                return name  # type: ignore[return-value]
    return None
