"""The host actor: a thin Ray shell around a `Host`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.util
import torch

from moeserve.allocator import give_back_when_quiet
from moeserve.cluster.folders import Hold, SocketFolder
from moeserve.config import ServedModel
from moeserve.host import Holdings, Host, Where
from moeserve.observe.stats import HostInfo, host_name
from moeserve.release import Release
from moeserve.transport import give_back_pools


@dataclass(frozen=True)
class HostOrder:
    """The configuration of a host, for all of its incarnations.

    Its socket is in `sockets`. `over_tcp`: frontends and hosts of other nodes, or of no node at all, reach it, too.
    """

    number: int
    model: ServedModel
    sockets: SocketFolder
    over_tcp: bool

    @property
    def name(self) -> str:
        """As its actor and its sockets are called."""
        return host_name(self.number)


# A host that loads for minutes still answers meanwhile.
@ray.remote(concurrency_groups={"ask": 1})  # type: ignore[call-overload]
class ExpertHost:
    """Holds the physical experts that releases give to host `order.number`, of every layer.

    Ray starts it again when it dies; each incarnation loads its experts anew and listens at an endpoint of its own.
    """

    def __init__(self, order: HostOrder) -> None:
        self._order = order
        self._folder: Hold | None = None
        self._host: Host | None = None

    @ray.method(concurrency_group="ask")
    def present(self) -> HostInfo | None:
        """The description of this incarnation; None until it has been started."""
        return None if self._host is None else self._host.info

    def start(self, releases: Sequence[Release], frontends: Collection[str]) -> HostInfo:
        """Load the experts of the releases in force and listen, once per incarnation; the `frontends` of these public keys may talk to it.

        Raises ConfigError, or CheckpointChanged when files have changed since the releases were made.
        """
        if self._host is None:
            self._host = self._start(releases, frontends)
        return self._host.info

    def take(self, release: Release) -> None:
        """As `Host.take`."""
        self._started.take(release)

    def withdraw(self, epoch: int) -> None:
        """As `Host.withdraw`; where it was the only one that could be loaded, this process ends, and the next tries anew."""
        self._started.withdraw(epoch)
        if self._started.holdings.is_empty:
            os._exit(1)

    def retire(self, epoch: int) -> None:
        """As `Host.retire`."""
        self._started.retire(epoch)

    def adopt(self, release: Release) -> None:
        """As `Host.adopt`."""
        self._started.adopt(release)

    def meet(self, directory: Mapping[int, HostInfo], frontends: Collection[str] | None) -> None:
        """As `Host.meet`. Before its start it does not listen; then it is called again."""
        if self._host is not None:
            self._host.meet(directory, frontends)

    @ray.method(concurrency_group="ask")
    def stop(self) -> None:
        """Finish the pass that is running, and remove the socket and, with the last one, its folder; a host that loads has neither."""
        if self._host is not None and self._folder is not None:
            self._host.stop()
            self._folder.let_go()

    @property
    def _started(self) -> Host:
        assert self._host is not None, "a host that has started"
        return self._host

    def _start(self, releases: Sequence[Release], frontends: Collection[str]) -> Host:
        order = self._order
        granted = ray.get_runtime_context().get_assigned_resources()
        num_threads = max(1, int(granted.get("CPU", 1)))
        torch.set_num_threads(num_threads)
        # Without a GPU in the grant, Ray leaves all of them visible, so the grant decides.
        has_gpu = bool(granted.get("GPU", 0))
        device = torch.device("cuda" if has_gpu and torch.cuda.is_available() else "cpu")
        holdings = Holdings(order.model, order.number, device)
        holdings.begin(releases)
        self._folder = Hold(order.sockets.path())
        where = Where(
            node=ray.get_runtime_context().get_node_id(),
            endpoints=_endpoints(order, self._folder.path),
            device=device,
            num_threads=num_threads,
            cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", "") if has_gpu else "",
        )
        give_back_when_quiet(give_back_pools)
        return Host(holdings, where, frontends, on_crash=lambda: os._exit(1))


def _endpoints(order: HostOrder, folder: Path) -> tuple[str, ...]:
    """Shared memory for clients on this node, and encrypted TCP for others."""
    for left_behind in folder.glob(f"{order.name}-*.sock"):
        left_behind.unlink(missing_ok=True)  # by an incarnation that was killed
    unix = f"unix:{folder / order.name}-{os.getpid()}.sock"
    return (unix, f"tcp://{ray.util.get_node_ip_address()}:0") if order.over_tcp else (unix,)
