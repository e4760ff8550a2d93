"""What a placement is made from, beside load: sizes of layers, hosts, and how many copies are allowed.

E experts of a layer that live on hosts, M shards each, U = E * M units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeserve.config import LayerSpec, PlacementConfig, Strategy
from moeserve.placement.deal import check_split, copies_of, pinned_copies
from moeserve.placement.layer import Integers

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class LayerSize:
    """Bytes of one layer's experts as hosts hold them.

    unit_bytes [U]; shared_bytes: of the shared expert, which every host with an expert of the layer holds too
    """

    name: str
    unit_bytes: Integers
    shared_bytes: int = 0


@dataclass(frozen=True)
class HostLimits:
    """A host: its number, how many bytes of weights it may hold (None = any), and its node ("" = unknown)."""

    number: int
    memory_bytes: int | None = None
    node: str = ""


@dataclass(frozen=True, eq=False)
class Constraints:
    """What every placement must keep to.

    hosts: by ascending number, with gaps; a number is one host forever
    least_copies, most_copies: [E] for each layer
    extra_copies: how many more physical than logical experts there may be, as a share; least_copies may need more
    experts_per_host: physical experts of a layer that a host may hold
    min_gain: by what share the load of a layer's busiest host must fall for experts to move; 1 = none move but those that must
    """

    hosts: tuple[HostLimits, ...]
    least_copies: tuple[Integers, ...]
    most_copies: tuple[Integers, ...]
    extra_copies: float = 0.0
    experts_per_host: int | None = None
    tensor_parallel: int = 1
    pipeline_stages: int = 1
    strategy: Strategy = "contiguous"
    min_gain: float = 0.05


def constraints_of(specs: Sequence[LayerSpec], config: PlacementConfig, hosts: Sequence[HostLimits], min_copies: int = 1) -> Constraints:
    """The constraints of [placement] on these hosts. Copies that the configuration names by layer or by expert are exact.

    Others are at least as many as placement.copies and min_copies. Raises ConfigError.
    """
    check_split(specs, config)
    copies = [(copies_of(spec, config), pinned_copies(spec, config)) for spec in specs]
    return Constraints(
        hosts=tuple(sorted(hosts, key=lambda host: host.number)),
        least_copies=tuple(np.where(pinned, each, np.maximum(each, min_copies)) for each, pinned in copies),
        most_copies=tuple(np.where(pinned, each, np.maximum(each, max(min_copies, len(hosts)))) for each, pinned in copies),
        experts_per_host=config.experts_per_host,
        tensor_parallel=config.tensor_parallel,
        pipeline_stages=config.pipeline_stages,
        strategy=config.strategy,
    )
