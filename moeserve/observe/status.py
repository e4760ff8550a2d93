"""The status of a service, as `moeserve status` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.observe.stats import HostFacts, HostShards


@dataclass(frozen=True)
class HostStatus(HostFacts):
    """One host; is_up = it has answered within the last seconds. `number` is its number in placements."""

    name: str
    is_up: bool
    pid: int = 0
    number: int = 0


@dataclass(frozen=True)
class FrontendStatus:
    """One frontend; `epoch` is what new batches use there; is_ready = it takes requests, and every expert is reachable."""

    name: str
    target: str
    metrics_target: str
    node: str
    epoch: int
    is_ready: bool


@dataclass(frozen=True)
class Rebalanced:
    """A round of balancing, done or only planned. epoch: of the placement in force.

    moves: experts that move to another host; new: further copies; kept: on the same host as before; moved_bytes: what the hosts read, in so
    many steps; balancedness: mean / max of the rows expected on the hosts of a layer, as a mean over layers
    """

    epoch: int
    moves: int
    new: int
    kept: int
    moved_bytes: int
    steps: int
    balancedness_before: float
    balancedness: float


@dataclass(frozen=True)
class LayerStatus:
    """One layer, E experts that live on hosts; `placement` names hosts by their numbers.

    copies [E]; demand_rows_per_s [E]: what callers of all frontends ask for
    host_balancedness: mean / max of the rows expected on the hosts, None = nobody has asked
    """

    name: str
    model_revision: int
    tensor_parallel: int
    placement: Sequence[HostShards]
    copies: Sequence[int] = ()
    demand_rows_per_s: Sequence[float] = ()
    host_balancedness: float | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """`wanted_hosts` is a number or "all"; `shortage` says which of these are missing, and why; "" = none.

    `is_changing`: a new epoch is being brought in; `changing`: by what kind of change, and how far a round is.
    """

    epoch: int
    wanted_hosts: str
    is_changing: bool
    shortage: str
    hosts: Sequence[HostStatus]
    frontends: Sequence[FrontendStatus]
    layers: Sequence[LayerStatus]
    changing: str = ""
