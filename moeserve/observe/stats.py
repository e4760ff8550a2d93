"""What hosts tell about themselves, and what a service has done since it started: records only, `summary.py` reckons with them.

E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def host_name(number: int) -> str:
    """What people call a host. Its number is its own for good: it is no position in any list."""
    return f"host-{number}"


@dataclass(frozen=True)
class HostShards:
    """What one host holds of a layer, in slot order: shard `shards[i]` of expert `experts[i]`; `host` is the host's number."""

    host: int
    experts: Sequence[int]
    shards: Sequence[int]


@dataclass(frozen=True)
class LayerStats:
    """tokens = used tokens answered; processed [E] and dropped [E] int64 count (token, expert) pairs.

    live_copies counts the copies of each expert on hosts that can be reached; each copy is cut into tensor_parallel shards.
    """

    name: str
    tokens: int
    processed: torch.Tensor
    dropped: torch.Tensor
    live_copies: Sequence[int] = ()
    tensor_parallel: int = 1
    placement: Sequence[HostShards] = ()


@dataclass(frozen=True)
class HostStats:
    """One host; cuda_visible_devices is what Ray set for its process, empty = no GPU was granted.

    queue_tokens = rows sent to it and not yet answered; number is what placements call it.
    """

    name: str
    up: bool
    restarts: int
    node: str
    device: str
    cuda_visible_devices: str
    weights_bytes: int
    queue_tokens: int = 0
    number: int = 0


@dataclass(frozen=True)
class Durations:
    """A histogram: counts[i] took at most upper_bounds_s[i] and more than the bound before; the last count is of all that took longer."""

    name: str
    upper_bounds_s: Sequence[float]
    counts: Sequence[int]
    sum_s: float


@dataclass(frozen=True)
class CallCount:
    """How many calls of a gRPC method were answered with a status code."""

    method: str
    code: str
    count: int


@dataclass(frozen=True)
class Event:
    """kind is host_up, host_lost, host_back, host_left, host_failing or call_failed; subject the host's name, or method and code.

    What happens again within seconds is one event: count says how often, time_unix_s when last.
    """

    time_unix_s: float
    kind: str
    subject: str
    count: int = 1


@dataclass(frozen=True)
class ServiceStats:
    """epoch = version of the placement in force; queue_tokens = tokens admitted and not yet answered; events: the oldest first.

    A rate is the difference of two snapshots' counts over that of their uptime_s.
    """

    epoch: int
    layers: Sequence[LayerStats]
    hosts: Sequence[HostStats]
    queue_tokens: int
    uptime_s: float = 0.0
    expert_retries: int = 0
    requests: Sequence[Durations] = ()
    stages: Sequence[Durations] = ()
    calls: Sequence[CallCount] = ()
    events: Sequence[Event] = ()


@dataclass(frozen=True)
class HostInfo:
    """What a host says of itself once it is ready.

    `endpoints` are where its listener is reached, `public_key` (Z85) whom to expect there when that is over TCP ("" = without keys);
    `node` is the Ray node it runs on;
    `cuda_visible_devices` is what Ray set for its process ("" = no GPU granted).
    It can be asked for work of `since_epoch` and later: when it started, weights of earlier releases could not be read any more.
    """

    name: str
    endpoints: tuple[str, ...]
    public_key: str
    node: str
    pid: int
    device: str
    cuda_visible_devices: str
    num_threads: int
    weights_bytes: int
    since_epoch: int = 0
