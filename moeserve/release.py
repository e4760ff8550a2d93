"""A release: the placement and the weights that are served from one epoch on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moeserve.checkpoints import (
    Fingerprint,
    LayerSource,
    ReleasedLayer,
    ServedLayers,
    Swap,
    compacted,
    fingerprint_of,
    layer_fingerprints,
)
from moeserve.observe.stats import HostShards, host_name
from moeserve.placement import Placement


@dataclass(frozen=True, eq=False)
class Release:
    """Immutable; a change is a new release with a higher epoch.

    `swaps` in order, without those that later ones have replaced; `deployed`: the fingerprint of the files of each layer
    at deployment, by its name.
    """

    placement: Placement
    swaps: tuple[Swap, ...] = ()
    deployed: Mapping[str, Fingerprint] = field(default_factory=dict)

    @classmethod
    def first(cls, placement: Placement, sources: Sequence[LayerSource]) -> Release:
        """The first release of a service. Raises CheckpointError naming a file that cannot be read."""
        return cls(placement, deployed=layer_fingerprints(sources))

    @property
    def epoch(self) -> int:
        """The epoch of its placement."""
        return self.placement.epoch

    def sources(self, layers: ServedLayers) -> list[ReleasedLayer]:
        """`layers` with the weights of this release; files that have changed since are not read.

        Raises ConfigError or CheckpointError.
        """
        return layers.swapped(self.swaps, self.deployed)

    @property
    def host_names(self) -> list[str]:
        """Names of the hosts that have experts, in the order of the placement."""
        return [host_name(number) for number in self.placement.hosts]

    def held(self, layer: int) -> list[HostShards]:
        """The experts of a layer, by host; hosts without any are left out."""
        shards_on = {number: self.placement.layers[layer].shards_on(number) for number in self.placement.hosts}
        return [
            HostShards(number, [one.expert for one in shards], [one.shard for one in shards])
            for number, shards in shards_on.items()
            if shards
        ]

    def origins(self, layer: str) -> dict[int | None, Swap]:
        """The swap with the weights of each expert; key None: of all other experts, and of the parts that belong to no single expert.

        Missing keys have the deployed weights.
        """
        origins: dict[int | None, Swap] = {}
        for swap in self.swaps:
            if swap.layer == layer:
                origins.update(dict.fromkeys([None] if swap.experts is None else swap.experts, swap.origin))
        return origins

    def revision(self, layer: str = "") -> int:
        """1 for a layer as it was deployed, one more for every swap since; "" = the highest of all layers."""
        return max((swap.revision for swap in self.swaps if layer in ("", swap.layer)), default=1)

    def swapped(self, swaps: Sequence[Swap], layers: ServedLayers, epoch: int) -> Release:
        """The same places with new weights, as the files of `swaps` are now. Raises UnknownLayer, ConfigError or CheckpointError."""
        newer = {source.spec.name: source for source in layers.swapped(swaps)}
        made = [
            replace(swap, revision=self.revision(swap.layer) + 1, fingerprint=fingerprint_of(newer[swap.layer].files_swapped()))
            for swap in swaps
        ]
        return replace(self, placement=replace(self.placement, epoch=epoch), swaps=compacted([*self.swaps, *made]))
