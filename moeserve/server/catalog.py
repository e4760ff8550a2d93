"""The served model and its layers: finding the one a request means, and describing them and their counts to clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moeserve.api.tensors import FLOAT_DTYPES, WIRE_NUMBERS
from moeserve.config import LayerSpec
from moeserve.errors import InvalidRequest, UnknownLayer
from moeserve.observe.stats import LayerStats, ServiceStats
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1.tensor_pb2 import DType

_MAX_NAMES: Final = 8


class Catalog:
    """`layers` in model order; a request names a layer by its position or its name."""

    def __init__(self, model: str, layers: Sequence[LayerSpec]) -> None:
        self.model = model
        self.layers = layers
        self._index = {spec.name: index for index, spec in enumerate(layers)}

    def resolve(self, model: str, layer: int | str | None) -> int:
        """The position of the layer. Raises InvalidRequest when none is named, UnknownLayer when it is not served."""
        if model and model != self.model:
            raise UnknownLayer(f"model {model[:80]!r} is not served; this service serves {self.model!r}")
        if layer is None:
            raise InvalidRequest("no layer is named: set layer_index or layer_name", "layer")
        if isinstance(layer, str):
            if layer not in self._index:
                raise UnknownLayer(f"there is no layer {layer[:80]!r}; served: {self._names()}")
            return self._index[layer]
        if not 0 <= layer < len(self.layers):
            raise UnknownLayer(f"there is no layer {layer}; served: 0..{len(self.layers) - 1} ({self._names()})")
        return layer

    def describe(self) -> pb.ListLayersResponse:
        """Every layer, for a client."""
        return pb.ListLayersResponse(model=self.model, layers=map(_describe, range(len(self.layers)), self.layers))

    def _names(self) -> str:
        names = [spec.name for spec in self.layers]
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return ", ".join(names[:_MAX_NAMES]) + more


def _describe(index: int, spec: LayerSpec) -> pb.LayerInfo:
    return pb.LayerInfo(
        index=index,
        name=spec.name,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_experts=spec.num_experts,
        top_k=spec.gating.top_k,
        activation=spec.expert_kind,
        dtype=DType.Name(WIRE_NUMBERS[FLOAT_DTYPES[spec.dtype]]),
        capacity_factor=spec.gating.capacity_factor,
    )


def describe_stats(stats: ServiceStats) -> pb.GetStatsResponse:
    """A snapshot, for a client."""
    return pb.GetStatsResponse(
        epoch=stats.epoch,
        layers=map(_layer_stats, range(len(stats.layers)), stats.layers),
        hosts=[pb.HostStats(**vars(host)) for host in stats.hosts],
        queue_tokens=stats.queue_tokens,
        uptime_s=stats.uptime_s,
        expert_retries=stats.expert_retries,
        requests=[pb.Durations(**vars(durations)) for durations in stats.requests],
        stages=[pb.Durations(**vars(durations)) for durations in stats.stages],
        calls=[pb.CallCount(**vars(call)) for call in stats.calls],
        events=[pb.Event(**vars(event)) for event in stats.events],
    )


def _layer_stats(index: int, layer: LayerStats) -> pb.LayerStats:
    return pb.LayerStats(
        index=index,
        name=layer.name,
        tokens=layer.tokens,
        processed=layer.processed.tolist(),
        dropped=layer.dropped.tolist(),
        live_copies=layer.live_copies,
        tensor_parallel=layer.tensor_parallel,
        placement=[pb.HostShards(**vars(held)) for held in layer.placement],
    )
