"""The seam between a service and what it runs on: Ray, or threads of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moeserve.control.assignments import Assignment
from moeserve.control.controller import HostFleet, Nodes
from moeserve.observe.stats import HostInfo
from moeserve.release import Release


@dataclass(frozen=True)
class Loss:
    """Why hosts that end do not come back; `is_final`: those that still run will end, too, and so will this process unless it leaves."""

    why: str
    is_final: bool


class Fleet(HostFleet, Protocol):
    """All hosts, and what only their owner does with them."""

    async def take(
        self, release: Release, assignments: Sequence[Assignment], on_ready: Callable[[HostInfo], None] = lambda _: None
    ) -> None:
        """As `HostFleet.take`; `on_ready` is told of each host that was started."""
        ...

    async def adopt(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """Make the hosts of an earlier controller one's own: those of `assignments` shall serve `release`, all others end."""
        ...

    def admit(self, public_keys: Collection[str]) -> asyncio.Future[None]:
        """Frontends that show these keys may talk to hosts over TCP, and no others; done when hosts have been told."""
        ...

    async def watch(self, on_change: Callable[[Mapping[int, HostInfo]], None]) -> None:
        """For ever: sees to it that hosts that end come back; tells at once where each is when that, or which there are, has changed."""
        ...

    def lose(self, why: str) -> None:
        """No host can be started any more."""
        ...

    async def stop(self) -> None:
        """End all hosts, whatever state they are in."""
        ...


class Store(Protocol):
    """A few bytes for the next controller of the same service, if there can be one."""

    def load(self) -> bytes | None:
        """What was saved last; None = nothing."""
        ...

    def save(self, value: bytes) -> None:
        """Replaces what was there."""
        ...

    def clear(self) -> None:
        """Nothing is saved any more."""
        ...


class MemoryStore:
    """A `Store` for controllers of this process."""

    def __init__(self) -> None:
        self._value: bytes | None = None

    def load(self) -> bytes | None:
        """What was saved last; None = nothing."""
        return self._value

    def save(self, value: bytes) -> None:
        """Replaces what was there."""
        self._value = value

    def clear(self) -> None:
        """Nothing is saved any more."""
        self._value = None


class Cluster(Protocol):
    """What hosts run on. Used in this order: `start`, `open`, everything else, `stop`."""

    @property
    def intent(self) -> str:
        """What `start` does, in words for people."""
        ...

    @property
    def is_private(self) -> bool:
        """Nobody outside this machine takes part."""
        ...

    @property
    def here(self) -> str:
        """The node that this process is on."""
        ...

    @property
    def nodes(self) -> Nodes:
        """All nodes."""
        ...

    @property
    def hosts(self) -> Fleet:
        """All hosts."""
        ...

    @property
    def store(self) -> Store:
        """What outlives a controller."""
        ...

    async def start(self) -> None:
        """Until nodes can be asked for. Raises ConfigError or MoEServeError; then nothing is left of it."""
        ...

    def open(self, service_id: str, *, is_followed: bool) -> None:
        """Hosts can be started from now on, for the service of this name; `is_followed`: frontends of other processes reach them, too."""
        ...

    async def lost(self) -> Loss:
        """Until hosts that end cannot come back."""
        ...

    async def stop(self) -> None:
        """Undo `start`. Idempotent."""
        ...
