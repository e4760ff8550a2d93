"""Which experts a host needs in a release, and what a change of releases costs in memory: pure functions."""

from __future__ import annotations

from collections import Counter
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


def bytes_of_both(before: Mapping[ExpertKey, int], after: Mapping[ExpertKey, int], *, in_stacks: bool) -> int:
    """What a host holds while it has the experts of two releases, both as `needed_bytes` says; the one that it reads is beside them.

    Each expert is there once. `in_stacks`: on a GPU, which wants the experts of a layer in one piece, layers that change are there twice,
    and while the piece is put together, what is new in it.
    """
    both = sum({**before, **after}.values())
    if not in_stacks:
        return both
    changed = {key.layer for key in after.keys() ^ before.keys()}
    kept, new = Counter[str](), Counter[str]()
    for key, nbytes in after.items():
        (kept if key in before else new)[key.layer] += nbytes
    return both + sum(kept[layer] for layer in changed) + max((new[layer] for layer in changed & kept.keys()), default=0)
