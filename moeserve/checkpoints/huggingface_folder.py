"""config.json of a Hugging Face folder -> its MoE layers, with sizes and gate; reads no weights.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import ValidationError

from moeserve.checkpoints.aliases import in_their_words, renamed
from moeserve.checkpoints.architectures import named_family
from moeserve.checkpoints.claims import check_claims
from moeserve.checkpoints.families import FAMILIES, family_of, is_known, supported
from moeserve.checkpoints.family import Family, Layout
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.json_file import read_json
from moeserve.checkpoints.keys import Config, LastRead, allowed_whole, has, is_whole, lookup, must_be, shown, whole
from moeserve.checkpoints.layer_tensors import check_dense, check_tensors, is_dense
from moeserve.checkpoints.lookalikes import unknown
from moeserve.checkpoints.quantization_config import read_scheme
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder
from moeserve.checkpoints.wrappers import everywhere, language_model, model_types
from moeserve.config import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, Dtype, GatingConfig, LayerSpec
from moeserve.errors import CheckpointError, ConfigError
from moeserve.gating.expert_groups import check_groups

log = logging.getLogger(__name__)

#: sizes of a layer, and what they can be at most
_MOST: Final = {"hidden_size": MAX_SIZE, "intermediate_size": MAX_SIZE, "num_experts": MAX_EXPERTS, "num_experts_per_tok": MAX_EXPERTS}


def huggingface_layers(folder: Path, dtype: Dtype | None, family: str | None = None) -> list[HuggingFaceLayer]:
    """All MoE layers of the folder, in model order.

    Reads config.json and the index; a file's header only where there is no index, or neither `dtype` nor config.json tells the type.
    `dtype` casts on load; None takes what config.json says, else what is stored. A model that is not wholly what its `model_type` says
    is served as the class that `architectures` names, if it is wholly that; `family` says what it is, whatever these two say. Raises
    CheckpointError naming the file or the key, ConfigError when there is no such family.
    """
    if family is not None and not is_known(family):
        raise ConfigError(f"model.family is {family!r}; supported: {', '.join(supported())}")
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    path = folder / "config.json"
    config = read_json(path)
    try:
        files = SafetensorsFolder(folder, read_scheme(folder, config))
        if is_dense(config, files):
            raise ValueError("none of the layers is an MoE layer: no key and no tensor is about experts")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if family is not None:
        return _told(family, config, files, dtype)
    names = model_types(config) or [str(config.get("model_type"))]
    own = next((name for name in names if is_known(name)), None)
    if own is None:
        raise CheckpointError(f"{path}: {unknown(names, lambda name: _read(name, config, files, dtype))}")
    other = named_family(config, FAMILIES)
    if other is None or FAMILIES[other] is FAMILIES.get(own):
        return _read(own, config, files, dtype)
    return _agreed(own, other, config, files, dtype)


def _told(family: str, config: Mapping[str, Any], files: SafetensorsFolder, dtype: Dtype | None) -> list[HuggingFaceLayer]:
    try:
        return _read(family, config, files, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; it was read as {family}, because model.family says so") from None


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
    try:
        family = family_of(model_type)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    section = LastRead(renamed(language_model(config), family.aliases))
    try:
        return _Model(family, section, files, dtype or _written_dtype(section, config)).layers(model_type)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {in_their_words(str(error), config, family.aliases)}") from None
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
        count = self._count = self._num_layers()
        layers = [self._layer(index, model_type) for index in range(count) if self._family.is_moe_layer(self._config, index)]
        if not layers:
            raise ValueError("none of the layers is an MoE layer")
        check_dense({*range(count)} - {layer.index for layer in layers}, self._files, self._family)
        return layers

    def _layer(self, index: int, model_type: str) -> HuggingFaceLayer:
        family = self._family
        config = family.of_layer(self._config, index)
        sizes = {name: self._size(config, getattr(family, name), index, at_most) for name, at_most in _MOST.items()}
        gating = GatingConfig(top_k=sizes["num_experts_per_tok"], **family.gating(config))
        layout = _needed(self._layout(index), gating)
        prefix, shared = layout.prefix.format(index=index), layout.shared_projections
        shared_size = self._shared_size() if layout.router and self._has_any(prefix, shared.weights(1)) else 0
        identity_experts = self._identity_experts()
        spec = LayerSpec(
            name=family.layer_name.format(index=index),
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_experts=sizes["num_experts"] + identity_experts,
            activation=family.activation(config),
            bias=family.bias and self._has_any(prefix, layout.experts.biases(1)),
            dtype=self._dtype or self._files.dtype(f"{prefix}.{layout.experts.first}"),
            gating=gating,
            identity_experts=identity_experts,
            shared_mixing=family.mixing(config) if shared_size else None,
        )
        has_shared_bias = bool(family.shared_bias) and self._has_any(prefix, shared.biases(1))
        shared_activation = family.shared_activation(config) if family.shared_activation is not None and shared_size else None
        layer = HuggingFaceLayer(spec, layout, index, self._files, shared_size, has_shared_bias, shared_activation)
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
        count = whole(self._config, key, 0, at_least=0) if key else 0
        if count > MAX_EXPERTS:
            raise must_be(self._config, key, allowed_whole(count, 0, MAX_EXPERTS))
        return count

    def _check_choices(self, spec: LayerSpec) -> None:
        if spec.gating.top_k > spec.num_experts:
            key = _key(self._config, self._family.num_experts_per_tok)
            raise must_be(self._config, key, f"at most {spec.num_experts}, the number of experts")
        try:
            check_groups(spec.num_experts, spec.gating)
        except ConfigError as error:
            count = f"{_key(self._config, self._family.num_experts)} is {spec.num_experts}"
            raise ValueError(f"{count}, but n_group and topk_group do not fit: {error}") from None

    def _num_layers(self) -> int:
        config, named_by = self._config, self._family.layers_named_by
        key = next((key for key in named_by if config.get(key) is not None), None)
        if key is None and not (named_by and config.get("num_hidden_layers") is None):
            key = _key(config, self._family.num_hidden_layers)
            if (count := whole(config, key)) > MAX_LAYERS:
                raise must_be(config, key, allowed_whole(count, 1, MAX_LAYERS))
            return count
        named = config.get(key or named_by[0])
        if not (isinstance(named, list | str) and named):
            raise must_be(config, key or named_by[0], "a list or a word with something for each layer")
        if len(named) > MAX_LAYERS:
            raise ValueError(f"{key or named_by[0]} has something for each of {len(named)} layers; allowed: at most {MAX_LAYERS}")
        return len(named)

    def _size(self, config: Config, keys: tuple[str, ...], index: int, at_most: int) -> int:
        """Of a layer, which may have its own in a list of one for each."""
        key = _key(config, keys)
        given = lookup(config, key)
        is_list = isinstance(given, list) and len(given) == self._count and all(is_whole(size, 1) for size in given)
        value = given[index] if is_list else given
        if not is_whole(value, 1) or value > at_most:
            per_layer = f", or a list of one for each of the {self._count} layers" if isinstance(value, list) else ""
            raise must_be(config, key, f"{allowed_whole(value, 1, at_most)}{per_layer}")
        return int(value)

    def _layout(self, index: int) -> Layout:
        """The first whose tensors are there, or at least its router's; without the biases that are not there."""
        prefixes = {layout: layout.prefix.format(index=index) for layout in everywhere(self._family.layouts)}
        routed = [layout for layout, prefix in prefixes.items() if self._has_any(prefix, [layout.router])]
        if not routed:
            routers = (f"{layout.prefix.format(index=index)}.{layout.router}" for layout in self._family.layouts)
            raise CheckpointError(f"{self._files.folder}: tensor {' or '.join(dict.fromkeys(routers))} is missing")
        layout = max(routed, key=lambda layout: sum(self._has_any(prefixes[layout], [name]) for name in layout.telling))
        biases = (layout.router_bias, layout.score_correction_bias)
        router_bias, selection_bias = (name if self._has_any(prefixes[layout], [name]) else "" for name in biases)
        return replace(layout, router_bias=router_bias, score_correction_bias=selection_bias)

    def _has_any(self, prefix: str, names: Iterable[str]) -> bool:
        return any(self._files.stored_as(f"{prefix}.{name}") for name in names)


def _key(config: Config, keys: tuple[str, ...]) -> str:
    """The first that says something, else the last that is there."""
    said = (key for key in keys if lookup(config, key) is not None)
    return next(said, next((key for key in reversed(keys) if has(config, key)), keys[0]))


def _needed(layout: Layout, gating: GatingConfig) -> Layout:
    """Without what this gate does not look at."""
    if gating.routing == "caller":
        return replace(layout, router="", router_bias="", score_correction_bias="", expert_table="", beside=("experts",))
    return replace(layout, score_correction_bias="") if gating.routing == "token_table" else replace(layout, expert_table="")


def _written_dtype(*configs: Config) -> Dtype | None:
    """What config.json calls `dtype`, or `torch_dtype` before transformers 5; in the table of the language model, else beside it."""
    for config in configs:
        for key in ("dtype", "torch_dtype"):
            name = str(config.get(key)).removeprefix("torch.")
            if name in get_args(Dtype):
                return name  # type: ignore[return-value]
    return None
