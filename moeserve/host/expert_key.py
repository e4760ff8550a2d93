"""Which experts a host needs in a release, and what a change of releases costs in memory: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moeserve.checkpoints import Fingerprint, LayerSource, Swap
from moeserve.config import LayerSpec
from moeserve.experts import ExpertShard
from moeserve.release import Release


class ExpertKey(NamedTuple):
    """A shard of an expert of a layer with the weights it has from `origin`; shard None = the layer's shared expert.

    origin: the swap that brought these weights, else the files at deployment; None = a seed.
    """

    layer: str
    shard: ExpertShard | None
    origin: Swap | Fingerprint | None


def needed(release: Release, layer: int, spec: LayerSpec, host: int) -> tuple[ExpertKey, ...]:
    """What `release` places of a layer on a host, by local expert; the shared expert is the last, where there is one."""
    shards: list[ExpertShard | None] = [*release.placement.layers[layer].shards_on(host)]
    if shards and spec.shared_mixing is not None:
        shards.append(None)
    origins, deployed = release.origins(spec.name), release.deployed.get(spec.name)
    rest = origins.get(None, deployed)
    return tuple(ExpertKey(spec.name, shard, rest if shard is None else origins.get(shard.expert, rest)) for shard in shards)


def needed_bytes(release: Release, sources: Sequence[LayerSource], host: int) -> dict[ExpertKey, int]:
    """The bytes of each expert that `release` places on a host; `sources` are its layers, of which no weights are read."""
    return {
        key: source.shared_nbytes() if key.shard is None else source.nbytes(key.shard)
        for layer, source in enumerate(sources)
        for key in needed(release, layer, source.spec, host)
    }


class ChangeBytes(NamedTuple):
    """Bytes of weights on a host before a change, at most while it happens, and after it."""

    before: int
    peak: int
    after: int


def change_bytes(before: Mapping[ExpertKey, int], after: Mapping[ExpertKey, int]) -> ChangeBytes:
    """From what the releases in force need to what the next one needs, both as `needed_bytes` says.

    At the peak a host has the experts of both, each once, and beside them the one that is being read. On a GPU, which wants the experts of
    a layer in one piece, layers that change are there twice.
    """
    missing = {key: nbytes for key, nbytes in after.items() if key not in before}
    held = sum(before.values())
    return ChangeBytes(held, held + sum(missing.values()) + max(missing.values(), default=0), sum(after.values()))
