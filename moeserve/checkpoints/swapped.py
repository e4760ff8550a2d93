"""The layers of a release: their files as they were when it was made, and newer ones that were swapped in. E experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

from moeserve.api.find_layer import find_layer
from moeserve.checkpoints.deepspeed import TOLD, is_deepspeed
from moeserve.checkpoints.fingerprint import Fingerprint, fingerprint_of
from moeserve.checkpoints.resolve import layer_sources
from moeserve.checkpoints.source import LayerSource
from moeserve.config import LayerConfig, LayerSpec, ServedModel
from moeserve.errors import CheckpointChanged, CheckpointError, ConfigError
from moeserve.experts import Expert, ExpertShard
from moeserve.gating import Mixer, Router


@dataclass(frozen=True)
class Swap:
    """New weights for a layer: all of it, its gate and shared expert too (experts = None), or some of its experts.

    They are those of `revision` of the layer on; `fingerprint` is of the files they are in, None = whatever is there.
    """

    layer: str
    checkpoint: Path
    experts: frozenset[int] | None = None
    revision: int = 2
    fingerprint: Fingerprint | None = None

    @property
    def origin(self) -> Swap:
        """The same, whatever else of it has been replaced since."""
        return replace(self, experts=None)


def compacted(swaps: Iterable[Swap]) -> tuple[Swap, ...]:
    """In their order, without what later ones replace: at most one of a whole layer and one for each of its experts."""
    kept: list[Swap] = []
    for swap in swaps:
        kept = [left for earlier in kept if (left := _left(earlier, swap)) is not None] + [swap]
    return tuple(kept)


def _left(earlier: Swap, later: Swap) -> Swap | None:
    if earlier.layer != later.layer:
        return earlier
    if earlier.experts is None or later.experts is None:
        return earlier if later.experts is not None else None
    experts = earlier.experts - later.experts
    return replace(earlier, experts=experts) if experts else None


def layer_fingerprints(sources: Sequence[LayerSource]) -> dict[str, Fingerprint]:
    """Of the files of each layer, by its name; layers of seeds have none. Raises CheckpointError naming a file that cannot be read."""
    files = {source.spec.name: source.files_read() for source in sources}
    fingerprint_of(list(dict.fromkeys(path for paths in files.values() for path in paths)))  # all at once, as layers share files
    return {name: fingerprint_of(paths) for name, paths in files.items() if paths}


def check_swap(swap: Swap, served: LayerSpec, newer: LayerSpec) -> None:
    """Raises ConfigError when the layers differ in more than weights, or there are no such experts."""
    for each in fields(LayerSpec):
        before, after = getattr(served, each.name), getattr(newer, each.name)
        if before != after:
            raise ConfigError(f"{swap.checkpoint}: {each.name} of layer {served.name} is {after}; the served layer has {before}")
    if swap.experts is not None and not swap.experts:
        raise ConfigError(
            f"the swap of layer {served.name} names no expert; allowed: 0..{served.num_hosted_experts - 1}, or all of the layer"
        )
    unknown = sorted(expert for expert in swap.experts or () if expert not in range(served.num_hosted_experts))
    if unknown:
        raise ConfigError(f"layer {served.name} has no expert {unknown[0]}; it has 0..{served.num_hosted_experts - 1}")


def _check_k_min(k_min: int, spec: LayerSpec) -> None:
    if spec.gating.routing == "caller":
        return
    top_k = spec.gating.choices_per_token(spec.num_experts)
    if k_min > top_k:
        raise ConfigError(f"layer {spec.name}: resilience.k_min is {k_min}; allowed: at most {top_k}, the choices of a token")


@dataclass(frozen=True, eq=False)
class ServedLayers:
    """The layers that are configured to be served, and their files as they were when they were `read`: what releases are made of."""

    model: ServedModel
    sources: Sequence[LayerSource]

    @classmethod
    def read(cls, model: ServedModel) -> ServedLayers:
        """Raises ConfigError or CheckpointError; reads no weights."""
        layers = cls(model, layer_sources(model))
        for spec in layers.specs:
            _check_k_min(model.resilience_of(spec.name).k_min, spec)
        return layers

    @property
    def specs(self) -> list[LayerSpec]:
        return [source.spec for source in self.sources]

    def swapped(self, swaps: Sequence[Swap], deployed: Mapping[str, Fingerprint] | None = None) -> list[ReleasedLayer]:
        """With the swaps made in their order. `deployed`: fingerprints by layer of what these are read from.

        Raises UnknownLayer, ConfigError or CheckpointError when a swap cannot be made; reads no weights.
        """
        layers = {source.spec.name: ReleasedLayer(Origin(source, (deployed or {}).get(source.spec.name))) for source in self.sources}
        newer: dict[tuple[str, Path], LayerSource] = {}
        for swap in compacted(swaps):
            find_layer([*layers], swap.layer)
            layer, where = layers[swap.layer], (swap.layer, swap.checkpoint)
            if where not in newer:
                newer[where] = self._newer(swap, layer.spec)
            check_swap(swap, layer.spec, newer[where].spec)
            layers[swap.layer] = layer.swapped(Origin(newer[where], swap.fingerprint, swap))
        return list(layers.values())

    def _newer(self, swap: Swap, served: LayerSpec) -> LayerSource:
        """What `swap` brings: the layer of that name in the new folder, in the served dtype, with the operator's changes to its gate."""
        kept = {"name", "gating"} | (TOLD if is_deepspeed(swap.checkpoint) else set())
        told = [layer for layer in self.model.layers if layer.name in {None, swap.layer}]
        changes = tuple(LayerConfig(**{key: getattr(layer, key) for key in layer.model_fields_set & kept}) for layer in told)
        model = self.model.model.model_copy(update={"checkpoint": swap.checkpoint, "layers": (swap.layer,), "dtype": served.dtype})
        (source,) = layer_sources(self.model.model_copy(update={"model": model, "layers": changes}))
        return source


@dataclass(frozen=True, eq=False)
class Origin:
    """A layer in files, of which nothing is read when they are not those of the fingerprint; None = whatever they are.

    `swap` brought it; None = the service was deployed with it.
    """

    source: LayerSource
    fingerprint: Fingerprint | None
    swap: Swap | None = None

    @cached_property
    def _files(self) -> Sequence[Path]:
        return self.source.files_read()

    def check(self) -> None:
        """Raises CheckpointChanged."""
        if self.fingerprint is None:
            return
        name, folder = self.source.spec.name, self._files[0].parent
        try:
            difference = self.fingerprint.difference(fingerprint_of(self._files))
        except CheckpointError as error:
            difference = str(error)
        if difference is not None:
            part = "" if self.swap is None else f" --layer {name}"
            if self.swap is not None and self.swap.experts is not None:
                part += f" --experts {','.join(map(str, sorted(self.swap.experts)))}"
            raise CheckpointChanged(
                f"layer {name} is not in {folder} any more as it is served: {difference}; put the old files back, or serve the new ones: "
                f"moeserve swap TARGET{part} --checkpoint {folder}"
            )

    @contextmanager
    def unchanged(self) -> Iterator[LayerSource]:
        """To read from. Raises CheckpointChanged, also for what changes meanwhile."""
        self.check()
        yield self.source
        self.check()


@dataclass(frozen=True, eq=False)
class ReleasedLayer:
    """A `LayerSource` made of others: `experts_from` has those of single experts, and everything else is from `rest`."""

    rest: Origin
    experts_from: Mapping[int, Origin] = field(default_factory=dict)

    def swapped(self, newer: Origin) -> ReleasedLayer:
        """With what its swap brings."""
        assert newer.swap is not None, "it comes from one"
        if newer.swap.experts is None:
            return ReleasedLayer(newer)
        return ReleasedLayer(self.rest, {**self.experts_from, **dict.fromkeys(newer.swap.experts, newer)})

    def check(self) -> None:
        """Raises CheckpointChanged when there is anything that could not be read any more."""
        for origin in dict.fromkeys([self.rest, *self.experts_from.values()]):
            origin.check()

    @property
    def spec(self) -> LayerSpec:
        return self.rest.source.spec

    @property
    def held_as(self) -> str:
        return self.rest.source.held_as

    @property
    def has_router_bias(self) -> bool:
        return self.rest.source.has_router_bias

    @property
    def has_selection_bias(self) -> bool:
        return self.rest.source.has_selection_bias

    def files_read(self) -> Sequence[Path]:
        origins = dict.fromkeys([self.rest, *self.experts_from.values()])
        return list(dict.fromkeys(path for origin in origins for path in origin.source.files_read()))

    def files_swapped(self) -> Sequence[Path]:
        """Those that came with swaps."""
        origins = dict.fromkeys([self.rest, *self.experts_from.values()])
        return list(dict.fromkeys(path for origin in origins if origin.swap is not None for path in origin.source.files_read()))

    def router(self) -> Router:
        with self.rest.unchanged() as source:
            return source.router()

    def experts(self, shards: Sequence[ExpertShard]) -> list[Expert]:
        by_origin: dict[Origin, list[ExpertShard]] = {}
        for shard in shards:
            by_origin.setdefault(self._origin(shard), []).append(shard)
        found: dict[ExpertShard, Expert] = {}
        for origin, wanted in by_origin.items():
            with origin.unchanged() as source:
                found.update(zip(wanted, source.experts(wanted), strict=True))
        return [found[shard] for shard in shards]

    def shared_expert(self) -> Expert | None:
        with self.rest.unchanged() as source:
            return source.shared_expert()

    def mixer(self) -> Mixer | None:
        with self.rest.unchanged() as source:
            return source.mixer()

    def nbytes(self, shard: ExpertShard) -> int:
        return self._origin(shard).source.nbytes(shard)

    def shared_nbytes(self) -> int:
        return self.rest.source.shared_nbytes()

    def _origin(self, shard: ExpertShard) -> Origin:
        return self.experts_from.get(shard.expert, self.rest)
