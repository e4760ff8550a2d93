"""Records of hosts, of served layers and of counts since the start; `summary.py` computes figures from them.

Fields are called as those of the messages: see `records.py`. Nothing here imports torch, which takes a second.

E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from moeserve.observe.records import keyed, shown

if TYPE_CHECKING:
    import torch


#: how a host does, as a frontend sees it: up; connected, and later than is usual for it; silent or erring; its socket is closed
Condition = Literal["up", "slow", "out", "down"]
CONDITIONS: Final[tuple[Condition, ...]] = get_args(Condition)


def host_name(number: int) -> str:
    """The name of a host. Its number never changes and is not a position in a list."""
    return f"host-{number}"


@dataclass(frozen=True)
class HostShards:
    """The experts of a layer on one host, by local expert: shard `shards[i]` of expert `experts[i]`; `host` is the host's number."""

    host: int
    experts: Sequence[int]
    shards: Sequence[int]


@dataclass(frozen=True)
class LayerInfo:
    """One served MoE layer; dtype is that of its expert weights; capacity_factor None = no capacity limit."""

    index: int
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str
    dtype: str
    capacity_factor: float | None


@dataclass(frozen=True)
class LayerStats:
    """tokens = used tokens answered; processed [E] and dropped [E] int64 count (token, expert) pairs, and are made of the lists when asked.

    live_copies counts the copies of each expert on reachable hosts; each copy is cut into tensor_parallel shards.
    host_balancedness: mean / max of the rows that the controller expects on the hosts; None = not known.
    """

    name: str
    tokens: int = shown("tokens", "total", is_public=True)
    processed_by_expert: Sequence[int] = keyed("processed")
    dropped_by_expert: Sequence[int] = keyed("dropped")
    live_copies: Sequence[int] = ()
    tensor_parallel: int = 1
    placement: Sequence[HostShards] = ()
    host_balancedness: float | None = None

    @cached_property
    def processed(self) -> torch.Tensor:
        """[E] int64."""
        return _counts(self.processed_by_expert)

    @cached_property
    def dropped(self) -> torch.Tensor:
        """[E] int64."""
        return _counts(self.dropped_by_expert)


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """The facts about a host that users see.

    `node` is the Ray node it runs on, `num_threads` compute a pass, `cuda_visible_devices` is the GPUs of its process ("" = none). What it
    holds is of all releases in force, each expert once; `experts_held` counts shards and shared experts each as one.
    """

    node: str = shown("node", "name", default="", is_public=True)
    device: str = shown("device", "text", default="")
    cuda_visible_devices: str = shown("GPUs", "text", default="")
    num_threads: int = shown("threads", "count", default=0, is_public=True)
    experts_held: int = 0
    weights_bytes: int = shown("weights", "bytes", default=0)


@dataclass(frozen=True)
class HostStats(HostFacts):
    """One host; queue_tokens = rows sent to it and not yet answered; `number` is its number in placements.

    busy_ratio = share of its time that it has lately spent in passes, None = not known.
    """

    name: str
    up: bool
    restarts: int = shown("restarts", "count", default=0, is_public=True)
    queue_tokens: int = shown("queue", "count", default=0, is_public=True)
    number: int = 0
    state: str = shown("state", "text", default="down", is_public=True)
    busy_ratio: float | None = shown("busy", "share", default=None, is_public=True)


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
    """kind is host_up, host_lost, host_back, host_left, host_slow, host_out, host_failing, call_failed, or rebalance_ and an outcome.

    subject is the host's name, method and code, or what a round of balancing did.

    An event that repeats within seconds is one record: count says how often, time_unix_s when last.
    """

    time_unix_s: float
    kind: str
    subject: str
    count: int = 1


@dataclass(frozen=True)
class ServiceStats:
    """epoch = version of the placement in force; queue_tokens = tokens admitted and not yet answered; events: the oldest first.

    changing: what the controller is bringing in, for people; "" = nothing.

    A rate is the difference of two snapshots' counts over that of their uptime_s.
    """

    epoch: int
    layers: Sequence[LayerStats]
    hosts: Sequence[HostStats]
    queue_tokens: int
    uptime_s: float = 0.0
    expert_retries: int = shown("sent again", "count", default=0, is_public=True)
    requests: Sequence[Durations] = ()
    stages: Sequence[Durations] = ()
    calls: Sequence[CallCount] = ()
    events: Sequence[Event] = ()
    changing: str = ""


@dataclass(frozen=True)
class HostInfo(HostFacts):
    """A host's description of itself, once it is ready.

    `endpoints` are its listener's addresses, `public_key` (Z85) is the host's key over TCP ("" = no keys).
    It accepts work of `since_epoch` and later: when it started, weights of earlier releases could not be read any more.
    """

    name: str
    endpoints: tuple[str, ...]
    public_key: str = ""
    pid: int = 0
    since_epoch: int = 0

    @property
    def incarnation(self) -> tuple[tuple[str, ...], str, int]:
        """Another one after every start; the rest of the description may change while the host lives."""
        return self.endpoints, self.public_key, self.pid


@dataclass(frozen=True)
class PassTime:
    """A host that began at `since_s` has spent `busy_s` seconds in passes by `now_s`, including a pass that still runs.

    Both are of the clock of its machine: each incarnation of a host has begun at another time.
    """

    since_s: float
    now_s: float
    busy_s: float


def facts(info: HostFacts | None) -> dict[str, Any]:
    """The fields of `HostFacts`, for another record; empty for a host without a description."""
    return {} if info is None else {one.name: getattr(info, one.name) for one in fields(HostFacts)}


def _counts(numbers: Sequence[int]) -> torch.Tensor:
    import torch  # noqa: PLC0415 - only for callers that need a tensor

    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
