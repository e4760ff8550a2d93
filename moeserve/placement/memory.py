"""How many bytes of weights a host will hold, known before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.config import LayerSpec
from moeserve.experts import is_gated
from moeserve.placement.plan import Placement
from moeserve.tensors import FLOAT_DTYPES


def expert_bytes(spec: LayerSpec) -> int:
    """Bytes of one expert: both projections and their biases."""
    projected = spec.intermediate_size * (2 if is_gated(spec.activation) else 1)
    elements = projected * spec.hidden_size + spec.hidden_size * spec.intermediate_size
    if spec.bias:
        elements += projected + spec.hidden_size
    return elements * FLOAT_DTYPES[spec.dtype].itemsize


def host_bytes(specs: Sequence[LayerSpec], placement: Placement, host: int) -> int:
    """Bytes of all the experts `host` holds."""
    return sum(expert_bytes(spec) * len(layer.experts_on(host)) for spec, layer in zip(specs, placement.layers, strict=True))
