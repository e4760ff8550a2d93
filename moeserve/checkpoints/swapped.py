"""A layer some of whose weights come from newer files. E experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from moeserve.checkpoints.deepspeed import TOLD, is_deepspeed
from moeserve.checkpoints.resolve import layer_sources
from moeserve.checkpoints.source import LayerSource
from moeserve.config import LayerConfig, LayerSpec, ServiceConfig
from moeserve.errors import ConfigError, UnknownLayer
from moeserve.experts import Expert, ExpertShard
from moeserve.gating import Mixer, Router


@dataclass(frozen=True)
class Swap:
    """New weights for a layer: all of it, its gate and shared expert too (experts = None), or some of its experts."""

    layer: str
    checkpoint: Path
    experts: frozenset[int] | None = None

    def changes(self, shard: ExpertShard) -> bool:
        """Whether these weights are new."""
        return self.experts is None or shard.expert in self.experts


def swapped_layers(config: ServiceConfig, swaps: Sequence[Swap]) -> list[LayerSource]:
    """`layer_sources`, with the swaps made in their order. Raises ConfigError or CheckpointError when one cannot be; reads no weights."""
    sources = layer_sources(config)
    names = [source.spec.name for source in sources]
    for swap in swaps:
        if swap.layer not in names:
            raise UnknownLayer(f"layer {swap.layer} is not served; served: {', '.join(names)}")
        number = names.index(swap.layer)
        sources[number] = SwappedLayer(sources[number], _newer(config, swap, sources[number].spec), swap)
    return sources


def _newer(config: ServiceConfig, swap: Swap, served: LayerSpec) -> LayerSource:
    """The layer of that name in the new folder, in the served dtype, with the operator's changes to its gate."""
    kept = {"name", "gating"} | (TOLD if is_deepspeed(swap.checkpoint) else set())
    told = [layer for layer in config.layers if layer.name in {None, swap.layer}]
    changes = tuple(LayerConfig(**{key: getattr(layer, key) for key in layer.model_fields_set & kept}) for layer in told)
    model = config.model.model_copy(update={"checkpoint": swap.checkpoint, "layers": (swap.layer,), "dtype": served.dtype})
    (source,) = layer_sources(config.model_copy(update={"model": model, "layers": changes}))
    return source


@dataclass(frozen=True)
class SwappedLayer:
    """`newer` where the swap says so, `older` elsewhere. Raises ConfigError when they differ in more than weights."""

    older: LayerSource
    newer: LayerSource
    swap: Swap

    def __post_init__(self) -> None:
        old, new = self.older.spec, self.newer.spec
        for field in fields(LayerSpec):
            before, after = getattr(old, field.name), getattr(new, field.name)
            if before != after:
                raise ConfigError(f"{self.swap.checkpoint}: {field.name} of layer {new.name} is {after}; the served layer has {before}")
        unknown = sorted(expert for expert in self.swap.experts or () if expert not in range(old.num_hosted_experts))
        if unknown:
            raise ConfigError(f"layer {old.name} has no expert {unknown[0]}; it has 0..{old.num_hosted_experts - 1}")

    @property
    def spec(self) -> LayerSpec:
        return self._rest.spec

    @property
    def held_as(self) -> str:
        return self._rest.held_as

    @property
    def has_router_bias(self) -> bool:
        return self._rest.has_router_bias

    @property
    def has_selection_bias(self) -> bool:
        return self._rest.has_selection_bias

    def router(self) -> Router:
        return self._rest.router()

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        new = iter(self.newer.experts([shard for shard in shards if self.swap.changes(shard)]))
        old = iter(self.older.experts([shard for shard in shards if not self.swap.changes(shard)]))
        return [next(new if self.swap.changes(shard) else old) for shard in shards]

    def shared_expert(self) -> Expert | None:
        return self._rest.shared_expert()

    def mixer(self) -> Mixer | None:
        return self._rest.mixer()

    def nbytes(self, shard: ExpertShard) -> int:
        return (self.newer if self.swap.changes(shard) else self.older).nbytes(shard)

    def shared_nbytes(self) -> int:
        return self._rest.shared_nbytes()

    @property
    def _rest(self) -> LayerSource:
        """Where everything that belongs to no single expert comes from."""
        return self.newer if self.swap.experts is None else self.older
