"""The served model and its layers: finding the layer of a request, and describing layers to clients."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.api.find_layer import find_layer
from moeserve.config import LayerSpec
from moeserve.errors import InvalidRequest, UnknownLayer
from moeserve.observe.stats import LayerInfo


class Catalog:
    """`layers` in model order; a request names a layer by its position or its name."""

    def __init__(self, model: str, layers: Sequence[LayerSpec]) -> None:
        self.model = model
        self.layers = layers
        self._names = [spec.name for spec in layers]

    def resolve(self, model: str, layer: int | str | None) -> int:
        """The position of the layer. Raises InvalidRequest when none is named, UnknownLayer when it is not served."""
        if model and model != self.model:
            raise UnknownLayer(f"model {model[:80]!r} is not served; this service serves {self.model!r}")
        if layer is None:
            raise InvalidRequest("no layer is named: set layer_index or layer_name", "layer")
        return find_layer(self._names, layer)

    def describe(self) -> list[LayerInfo]:
        """Every layer, for a client."""
        return [_describe(index, spec) for index, spec in enumerate(self.layers)]


def _describe(index: int, spec: LayerSpec) -> LayerInfo:
    return LayerInfo(
        index=index,
        name=spec.name,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_experts=spec.num_experts,
        top_k=spec.gating.top_k,
        activation=spec.expert_kind,
        dtype=spec.dtype,
        capacity_factor=spec.gating.capacity_factor,
    )
