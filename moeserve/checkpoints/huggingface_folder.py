"""config.json of a Hugging Face folder -> its MoE layers, with sizes and gate; reads no weights.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from moeserve.checkpoints.families import family_of
from moeserve.checkpoints.family import Family, Layout, lookup
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.checkpoints.quantization_config import read_scheme
from moeserve.checkpoints.safetensors_folder import SafetensorsFolder, read_json
from moeserve.config import Dtype, GatingConfig, LayerSpec
from moeserve.errors import CheckpointError


def huggingface_layers(folder: Path, dtype: Dtype | None) -> list[HuggingFaceLayer]:
    """All MoE layers of the folder, in model order. Reads config.json and the index; a file's header only where there is no index,
    or neither `dtype` nor config.json tells the type.

    `dtype` casts on load; None takes what config.json says, else what is stored. Raises CheckpointError naming the file or the key.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    path = folder / "config.json"
    config = read_json(path)
    try:
        family = family_of(str(config.get("model_type")))
        return _Model(family, config, SafetensorsFolder(folder, read_scheme(folder, config)), dtype).layers()
    except ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:
        # What the functions of a family run into when a key holds another kind of value than it does in that family.
        raise CheckpointError(f"{path} is not that of a {config.get('model_type')} model: {error}") from error


class _Model:
    """One reading of config.json. Raises ValueError with a sentence that names the key."""

    def __init__(self, family: Family, config: Mapping[str, Any], files: SafetensorsFolder, dtype: Dtype | None) -> None:
        self._family = family
        self._whole = config
        self._config: Mapping[str, Any] = config.get(family.section, config) if family.section else config
        self._files = files
        self._dtype = dtype or self._written_dtype()

    def layers(self) -> list[HuggingFaceLayer]:
        count = self._size(self._family.num_hidden_layers)
        sizes = ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok")
        for size in sizes:
            self._size(getattr(self._family, size))
        indexes = [index for index in range(count) if self._family.is_moe_layer(self._config, index)]
        if not indexes:
            raise ValueError(f"none of the {count} layers is an MoE layer")
        return [self._layer(index) for index in indexes]

    def _layer(self, index: int) -> HuggingFaceLayer:
        family, config = self._family, self._config
        layout = self._layout(index)
        shared_size = family.shared_size(config)
        identity_experts = int(config.get(family.identity_experts) or 0) if family.identity_experts else 0
        spec = LayerSpec(
            name=family.layer_name.format(index=index),
            hidden_size=self._size(family.hidden_size),
            intermediate_size=self._size(family.intermediate_size, index),
            num_experts=self._size(family.num_experts, index) + identity_experts,
            activation=family.activation(config),
            bias=family.bias,
            dtype=self._dtype or self._files.dtype(f"{layout.prefix.format(index=index)}.{layout.experts.first}"),
            gating=GatingConfig(top_k=self._size(family.num_experts_per_tok, index), **family.gating(config)),
            identity_experts=identity_experts,
            shared_mixing=family.shared_mixing if shared_size else None,
        )
        has_shared_bias = bool(family.shared_bias) and bool(config.get(family.shared_bias))
        return HuggingFaceLayer(spec, layout, index, self._files, shared_size, has_shared_bias)

    def _size(self, keys: tuple[str, ...], index: int = 0) -> int:
        key = next((key for key in keys if lookup(self._config, key) is not None), keys[0])
        value = lookup(self._config, key)
        if isinstance(value, list) and index < len(value):
            value = value[index]
        if type(value) is not int or value < 1:
            given = "missing" if value is None and not _has(self._config, key) else repr(value)
            raise ValueError(f"{key} must be a positive whole number, but is {given}")
        return value

    def _layout(self, index: int) -> Layout:
        """The first whose tensors are there, or at least its router's: reading the rest then says what is missing."""
        routers = {layout: f"{layout.prefix.format(index=index)}.{layout.router}" for layout in self._family.layouts}
        routed = [layout for layout, router in routers.items() if router in self._files]
        if not routed:
            raise CheckpointError(f"{self._files.folder}: tensor {' or '.join(dict.fromkeys(routers.values()))} is missing")
        return max(routed, key=lambda layout: sum(f"{layout.prefix.format(index=index)}.{name}" in self._files for name in layout.telling))

    def _written_dtype(self) -> Dtype | None:
        """What config.json calls `dtype`, or `torch_dtype` before transformers 5."""
        for config in (self._config, self._whole):
            for key in ("dtype", "torch_dtype"):
                name = str(config.get(key)).removeprefix("torch.")
                if name in get_args(Dtype):
                    return name  # type: ignore[return-value]
        return None


def _has(config: Mapping[str, Any], key: str) -> bool:
    table, _, name = key.rpartition(".")
    return name in ((lookup(config, table) or {}) if table else config)
