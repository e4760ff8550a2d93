"""The host actor: a thin Ray shell around a `Host`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ray
import ray.util
import torch

from moeserve.addresses import join
from moeserve.allocator import give_back_when_quiet
from moeserve.cluster.folders import Hold, SocketFolder
from moeserve.config import ServedModel
from moeserve.host import Holdings, Host, Where, give_way
from moeserve.loops import in_thread
from moeserve.observe.stats import HostInfo, PassTime, host_name
from moeserve.release import Release
from moeserve.transport import give_back_pools

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class HostOrder:
    """The configuration of a host, for all of its incarnations.

    Its socket is in `sockets`. `over_tcp`: frontends and hosts of other nodes, or of no node at all, reach it, too.
    memory_bytes: of weights, None = any number.
    """

    number: int
    model: ServedModel
    sockets: SocketFolder
    over_tcp: bool
    memory_bytes: int | None = None

    @property
    def name(self) -> str:
        """As its actor and its sockets are called."""
        return host_name(self.number)


@ray.remote
class ExpertHost:
    """Holds the physical experts that releases give to host `order.number`, of every layer.

    Ray starts it again when it dies; each incarnation loads its experts anew and listens at an endpoint of its own. It loads in threads
    that nobody waits for: one that hangs keeps it neither from answering nor from what comes next.
    """

    def __init__(self, order: HostOrder) -> None:
        self._order = order
        self._folder: Hold | None = None
        self._holdings: Holdings | None = None
        self._host: Host | None = None
        self._starting: asyncio.Future[Host] | None = None
        granted = ray.get_runtime_context().get_assigned_resources()
        self._num_threads = max(1, int(granted.get("CPU", 1)))
        # Without a GPU in the grant, Ray leaves all of them visible, so the grant decides.
        self._has_gpu = bool(granted.get("GPU", 0))
        self._node = ray.get_runtime_context().get_node_id()

    async def present(self) -> HostInfo | None:
        """The description of this incarnation; None until it has been started."""
        return None if self._host is None else self._host.info

    async def pass_time(self) -> PassTime | None:
        """How busy this incarnation has been; None until it has been started."""
        return None if self._host is None else self._host.pass_time

    async def experts_read(self) -> int:
        """Since it was started, of whatever release."""
        return 0 if self._holdings is None else self._holdings.experts_read

    async def start(self, releases: Sequence[Release], frontends: Collection[str]) -> HostInfo:
        """Load the experts of the releases in force and listen, once per incarnation; the `frontends` of these public keys may talk to it.

        Who calls while it loads says what is in force by then: all else is forgotten. Raises ConfigError, or CheckpointChanged when files
        have changed since the releases were made.
        """
        if self._host is None:
            starting = self._starting = self._starting or asyncio.ensure_future(in_thread(self._start, releases, frontends))
            try:
                self._host = await starting
            finally:
                self._starting = None
            if releases:
                await self.withdraw(releases[-1].epoch + 1)
                await self.retire(releases[0].epoch)
        return self._host.info

    async def take(self, release: Release) -> None:
        """As `Host.take`."""
        await in_thread(self._load, self._started.take, release)

    async def withdraw(self, epoch: int) -> None:
        """As `Host.withdraw`; where it was the only one that could be loaded, this process ends, and the next tries anew."""
        self._started.withdraw(epoch)
        if self._started.holdings.is_empty:
            os._exit(1)

    async def retire(self, epoch: int) -> None:
        """As `Host.retire`."""
        self._started.retire(epoch)

    async def adopt(self, release: Release) -> None:
        """As `Host.adopt`."""
        await in_thread(self._load, self._started.adopt, release)

    async def meet(self, directory: Mapping[int, HostInfo], frontends: Collection[str] | None) -> None:
        """As `Host.meet`. Before its start it does not listen; then it is called again."""
        if self._host is not None:
            self._host.meet(directory, frontends)

    async def stop(self) -> None:
        """Finish the pass that is running, and remove the socket and, with the last one, its folder; a host that loads has neither."""
        if self._host is not None and self._folder is not None:
            await in_thread(self._host.stop)
            self._folder.let_go()

    @property
    def _started(self) -> Host:
        assert self._host is not None, "a host that has started"
        return self._host

    def _load(self, load: Callable[[Loaded], None], what: Loaded) -> None:
        torch.set_num_threads(self._num_threads)  # of this thread, which is a new one
        if self._host is not None:  # it loads while it serves
            give_way()
        load(what)

    def _start(self, releases: Sequence[Release], frontends: Collection[str]) -> Host:
        order = self._order
        device = torch.device("cuda" if self._has_gpu and torch.cuda.is_available() else "cpu")
        holdings = self._holdings = Holdings(order.model, order.number, device, order.memory_bytes)
        self._load(holdings.begin, releases)
        self._folder = Hold(order.sockets.path())
        where = Where(
            node=self._node,
            endpoints=_endpoints(order, self._folder.path),
            device=device,
            num_threads=self._num_threads,
            cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", "") if self._has_gpu else "",
        )
        give_back_when_quiet(give_back_pools)
        return Host(holdings, where, frontends, on_crash=lambda: os._exit(1))


def _endpoints(order: HostOrder, folder: Path) -> tuple[str, ...]:
    """Shared memory for clients on this node, and encrypted TCP for others."""
    for left_behind in folder.glob(f"{order.name}-*.sock"):
        left_behind.unlink(missing_ok=True)  # by an incarnation that was killed
    unix = f"unix:{folder / order.name}-{os.getpid()}.sock"
    return (unix, f"tcp://{join(ray.util.get_node_ip_address(), 0)}") if order.over_tcp else (unix,)
