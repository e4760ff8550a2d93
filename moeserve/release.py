"""What is served from one epoch on: where the experts are, and which weights they have."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeserve.checkpoints import LayerSource, Swap, swapped_layers
from moeserve.config import ServiceConfig
from moeserve.placement import Placement
from moeserve.stats import HostShards, host_name


@dataclass(frozen=True, eq=False)
class Release:
    """Immutable; a change is a new release with a higher epoch."""

    placement: Placement
    swaps: tuple[Swap, ...] = ()

    @property
    def epoch(self) -> int:
        return self.placement.epoch

    def sources(self, config: ServiceConfig) -> list[LayerSource]:
        """The layers with the weights of this release. Raises ConfigError or CheckpointError."""
        return swapped_layers(config, self.swaps)

    @property
    def host_names(self) -> list[str]:
        return [host_name(number) for number in self.placement.hosts]

    def held(self, layer: int) -> list[HostShards]:
        """What each host has of a layer; hosts without any of it are left out."""
        shards_on = {number: self.placement.layers[layer].shards_on(number) for number in self.placement.hosts}
        return [
            HostShards(number, [one.expert for one in shards], [one.shard for one in shards])
            for number, shards in shards_on.items()
            if shards
        ]

    def rest_of(self, layer: str) -> Swap | None:
        """The swap that brought what belongs to no single expert of a layer, its gate above all; None = it is as it was deployed."""
        return next((swap for swap in reversed(self.swaps) if swap.layer == layer and swap.experts is None), None)

    def revision(self, layer: str) -> int:
        """1 for a layer as it was deployed, one more for every swap since."""
        return 1 + sum(swap.layer == layer for swap in self.swaps)

    def swapped(self, swap: Swap, epoch: int) -> Release:
        """The same places with new weights."""
        return Release(replace(self.placement, epoch=epoch), (*self.swaps, swap))
