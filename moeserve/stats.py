"""What hosts tell about themselves, and what a service has done since it started.

E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerStats:
    """tokens = used tokens answered; processed [E] and dropped [E] int64 count (token, expert) pairs."""

    name: str
    tokens: int
    processed: torch.Tensor
    dropped: torch.Tensor


@dataclass(frozen=True)
class HostStats:
    """One host; cuda_visible_devices is what Ray set for its process, empty = no GPU was granted."""

    name: str
    up: bool
    restarts: int
    node: str
    device: str
    cuda_visible_devices: str
    weights_bytes: int


@dataclass(frozen=True)
class ServiceStats:
    """epoch = version of the placement in force; queue_tokens = tokens admitted and not yet answered."""

    epoch: int
    layers: Sequence[LayerStats]
    hosts: Sequence[HostStats]
    queue_tokens: int


@dataclass(frozen=True)
class HostInfo:
    """What a host says of itself once it is ready.

    `endpoints` are where its listener is reached, `public_key` (Z85) whom to expect there when that is over TCP ("" = without keys);
    `node` is the Ray node it runs on;
    `cuda_visible_devices` is what Ray set for its process ("" = no GPU granted).
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
