"""The seam between a service and its cluster: Ray, or threads of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moeserve.control.assignments import Assignment
from moeserve.control.first_state import Nodes
from moeserve.control.fleet import HostFleet
from moeserve.observe.stats import HostInfo
from moeserve.release import Release


@dataclass(frozen=True)
class Loss:
    """Why hosts cannot be restarted; `is_final`: running hosts will end, too, and so will this process, unless it disconnects."""

    why: str
    is_final: bool


class Fleet(HostFleet, Protocol):
    """All hosts, and the operations of their owner."""

    async def take(
        self, release: Release, assignments: Sequence[Assignment], on_ready: Callable[[HostInfo], None] = lambda _: None
    ) -> None:
        """As `HostFleet.take`; `on_ready` is called for each host that was started."""
        ...

    async def adopt(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """Take over the hosts of an earlier controller: those of `assignments` serve `release`, all others end.

        Batches may still use earlier releases, which hosts keep until `retire`.
        """
        ...

    def admit(self, public_keys: Collection[str]) -> asyncio.Future[None]:
        """Only frontends with these keys may talk to hosts over TCP; returns when the hosts know."""
        ...

    async def watch(self, on_change: Callable[[Mapping[int, HostInfo]], None]) -> None:
        """Runs until cancelled: restarts hosts that end, and reports the hosts and where they are after every change."""
        ...

    def lose(self, why: str) -> None:
        """Starts no more hosts."""
        ...

    async def stop(self) -> None:
        """End all hosts, in any state."""
        ...


class Store(Protocol):
    """A few bytes for the next controller of the same service."""

    def load(self) -> bytes | None:
        """The saved bytes; None = nothing."""
        ...

    def save(self, value: bytes) -> None:
        """Replaces the saved bytes."""
        ...

    def clear(self) -> None:
        """Deletes the saved bytes."""
        ...


class MemoryStore:
    """A `Store` for controllers of this process."""

    def __init__(self) -> None:
        self._value: bytes | None = None

    def load(self) -> bytes | None:
        """The saved bytes; None = nothing."""
        return self._value

    def save(self, value: bytes) -> None:
        """Replaces the saved bytes."""
        self._value = value

    def clear(self) -> None:
        """Deletes the saved bytes."""
        self._value = None


class Cluster(Protocol):
    """The machines or threads that hosts run on. Used in this order: `start`, `open`, everything else, `stop`."""

    @property
    def intent(self) -> str:
        """A description of `start` for users."""
        ...

    @property
    def is_private(self) -> bool:
        """Whether no other machine takes part."""
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
        """The storage that outlives a controller."""
        ...

    async def start(self) -> None:
        """Starts or joins the cluster. Raises ConfigError or MoEServeError, and cleans up first."""
        ...

    def open(self, service_id: str, *, is_followed: bool) -> None:
        """Allows hosts of this service to start; `is_followed`: frontends of other processes reach them, too."""
        ...

    async def lost(self) -> Loss:
        """Waits until hosts cannot be restarted any more; returns why."""
        ...

    async def stop(self) -> None:
        """Undo `start`. Idempotent."""
        ...
