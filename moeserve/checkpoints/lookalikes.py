"""A model type that nobody knows: which known family its keys and tensors are those of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeserve.checkpoints.families import FAMILIES, supported
from moeserve.checkpoints.family import Family
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.errors import CheckpointError
from moeserve.experts import ExpertShard

Read = Callable[[str], Sequence[HuggingFaceLayer]]


def unknown(model_types: Sequence[str], read: Read) -> str:
    """The sentence about a model whose type, and whatever it is part of, is not supported; `read` makes the layers of a family of it."""
    told = f"model_type is {' (in '.join(model_types)}{')' * (len(model_types) - 1)}, which is not known"
    alike = lookalikes(read)
    if not alike:
        return f"{told}, and no known family has its keys and tensors; supported: {', '.join(supported())}"
    return f"{told}; its keys and tensors are those of {' or '.join(alike)}: --family {alike[0]} (model.family) serves it as such"


def lookalikes(read: Read) -> list[str]:
    """The families whose keys the model has, whose tensors are all there, and no others; of those that compute the same, the first."""
    found: dict[str, Sequence[HuggingFaceLayer]] = {}
    for name in FAMILIES:
        try:
            layers = read(name)
            if layers not in found.values() and _has_its_bias(layers[0], FAMILIES[name]) and _has_those_sizes(layers[0]):
                found[name] = layers
        except CheckpointError:
            continue
    return list(found)


def _has_its_bias(layer: HuggingFaceLayer, family: Family) -> bool:
    return layer.has_selection_bias or not all(layout.score_correction_bias for layout in family.layouts)


def _has_those_sizes(layer: HuggingFaceLayer) -> bool:
    """Whether the tensors have the sizes that the keys of the family say, as far as they are here already."""
    if not any(layer.files.folder.glob("*.safetensors")):
        return True
    try:
        layer.router(), layer.mixer(), layer.shared_expert(), layer.experts([ExpertShard(0)])
    except CheckpointError:
        return False
    return True
