"""The host actor: a thin Ray shell around the host's loop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import ray.util
import torch

from moeserve.allocator import give_back_when_quiet
from moeserve.cluster.folders import Hold, SocketFolder
from moeserve.config import ServiceConfig
from moeserve.host import Holdings, HostLoop, Relay
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.transport import HostKeys, KeyPair, give_back_pools, listen


@dataclass(frozen=True)
class HostOrder:
    """What a host needs to know to come up, again and again.

    Its socket is in `sockets`. `over_tcp`: frontends and hosts of other nodes, or of no node at all, reach it, too.
    """

    name: str
    number: int
    config: ServiceConfig
    sockets: SocketFolder
    over_tcp: bool


# A host that loads for minutes says meanwhile that it is there.
@ray.remote(concurrency_groups={"ask": 1})  # type: ignore[call-overload]
class ExpertHost:
    """Holds the physical experts that releases give to host `order.number`, of every layer.

    Ray starts it again when it dies; each incarnation loads its experts anew and listens at an endpoint of its own.
    """

    def __init__(self, order: HostOrder) -> None:
        self._order = order
        self._info: HostInfo | None = None
        self._holdings: Holdings | None = None
        self._loop: HostLoop | None = None
        self._thread: threading.Thread | None = None
        self._relay: Relay | None = None
        self._keys: HostKeys | None = None
        self._folder: Hold | None = None
        self._frontends: Collection[str] = ()

    @ray.method(concurrency_group="ask")
    def present(self) -> HostInfo | None:
        """What this incarnation says of itself; None until it has been started."""
        return self._info

    def start(self, releases: Sequence[Release], frontends: Collection[str]) -> HostInfo:
        """Load the experts of the releases in force and listen, once per incarnation; the `frontends` of these public keys may talk to it.

        Raises ConfigError, or CheckpointChanged when files are not those any more that the releases were made of.
        """
        if self._info is None:
            self._info = self._start(releases, frontends)
        return self._info

    def take(self, release: Release) -> None:
        """Load what is new in a release beside what is served. Raises ConfigError or CheckpointError, and forgets it then."""
        self._change(lambda holdings: holdings.take(release))

    def withdraw(self, epoch: int) -> None:
        """Forget a release that will not be; where it was the only one that could be loaded, this process ends, and the next tries anew."""
        self._change(lambda holdings: holdings.withdraw(epoch))
        if self._holdings is not None and self._holdings.is_empty:
            os._exit(1)

    def retire(self, epoch: int) -> None:
        """Forget what was before a release that everybody uses now."""
        self._change(lambda holdings: holdings.retire(epoch))

    def adopt(self, release: Release) -> None:
        """This release and no other, whatever was under way."""

        def change(holdings: Holdings) -> None:
            holdings.withdraw(release.epoch + 1)
            holdings.take(release)
            holdings.retire(release.epoch)

        self._change(change)

    def _change(self, change: Callable[[Holdings], None]) -> None:
        assert self._holdings is not None and self._info is not None, "a host that has started"
        change(self._holdings)
        self._info = replace(self._info, weights_bytes=self._holdings.bank_table.nbytes)

    def meet(self, directory: Mapping[int, HostInfo], frontends: Collection[str] | None) -> None:
        """All hosts by number as they are now, and the public keys of all frontends: these may talk to this one, and nobody else.

        None = the frontends it knows. Before it has started it does not listen, and will be introduced again.
        """
        if self._relay is not None and self._keys is not None:
            self._frontends = self._frontends if frontends is None else frontends
            self._keys.allow({*self._frontends, *(info.public_key for info in directory.values())})
            self._relay.meet(directory)

    @ray.method(concurrency_group="ask")
    def stop(self) -> None:
        """Finish the pass that is running, and remove the socket and, with the last one, its folder; a host that loads has neither."""
        if self._loop is not None and self._thread is not None and self._folder is not None:
            self._loop.stop()
            self._thread.join()
            self._folder.let_go()

    def _start(self, releases: Sequence[Release], frontends: Collection[str]) -> HostInfo:
        order = self._order
        granted = ray.get_runtime_context().get_assigned_resources()
        num_threads = max(1, int(granted.get("CPU", 1)))
        torch.set_num_threads(num_threads)
        # With no GPU granted Ray leaves all of them visible, so what counts is the grant.
        has_gpu = bool(granted.get("GPU", 0))
        device = torch.device("cuda" if has_gpu and torch.cuda.is_available() else "cpu")
        self._holdings = Holdings(order.config, order.number, device)
        self._holdings.begin(releases)
        keys, self._frontends = KeyPair.generate(), frontends
        self._keys = HostKeys(keys, frozenset(frontends))
        self._folder = Hold(order.sockets.path())
        listener = listen(*_endpoints(order, self._folder.path), keys=self._keys)
        self._relay = Relay(order.number, keys)
        self._loop = HostLoop(self._holdings.bank_table, listener, self._relay)
        self._thread = threading.Thread(target=_run, args=(self._loop, num_threads), name="expert-host", daemon=True)
        self._thread.start()
        give_back_when_quiet(give_back_pools)
        return HostInfo(
            name=order.name,
            endpoints=listener.endpoints,
            public_key=keys.public,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            device=str(device),
            cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", "") if has_gpu else "",
            num_threads=num_threads,
            weights_bytes=self._holdings.bank_table.nbytes,
            since_epoch=self._holdings.since_epoch,
        )


def _endpoints(order: HostOrder, folder: Path) -> list[str]:
    """Shared memory for everybody on this node, and encrypted TCP for everybody else."""
    for left_behind in folder.glob(f"{order.name}-*.sock"):
        left_behind.unlink(missing_ok=True)  # by an incarnation that was killed
    unix = f"unix:{folder / order.name}-{os.getpid()}.sock"
    return [unix, f"tcp://{ray.util.get_node_ip_address()}:0"] if order.over_tcp else [unix]


def _run(loop: HostLoop, num_threads: int) -> None:
    # OpenMP keeps this setting per thread, and the math libraries below torch ask OpenMP: without it every matmul of this
    # thread would be spread over all cores of the machine.
    torch.set_num_threads(num_threads)
    loop.run()
