"""One running expert host: its experts, and the loop that answers with them, in a thread of its own."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import torch

from moeserve.host.holdings import Holdings
from moeserve.host.loop import HostLoop
from moeserve.host.relay import Relay
from moeserve.observe.stats import HostInfo, PassTime, host_name
from moeserve.release import Release
from moeserve.transport import HostKeys, KeyPair, listen

log = logging.getLogger(__name__)

#: of threads that compute or load, more than their process: where cores are scarce, frontends and callers, who have less to do, come first
_NICE: Final = 4


def give_way() -> None:
    """Makes this thread, and those that it starts from now on, nicer than the process for good, where it may."""
    if sys.platform != "linux":  # elsewhere a thread has no priority of its own
        return
    own, process = threading.get_native_id(), os.getpid()
    assert own != process, "a thread that does nothing but a host's work"
    with suppress(OSError):  # it is nicer already, as after `renice` of the process, or a sandbox forbids it
        os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, process) + _NICE))


@dataclass(frozen=True)
class Where:
    """Where a host runs: its node, what it computes on, and the endpoints it listens at.

    `cuda_visible_devices` are its GPUs ("" = none); `num_threads` compute a pass.
    """

    node: str
    endpoints: tuple[str, ...]
    device: torch.device
    num_threads: int
    cuda_visible_devices: str = ""


class Host:
    """Serves `holdings`, which have begun, until `stop`; frontends with these public keys may talk to it over TCP.

    `on_crash` is called by the host's thread if it fails, after its listener is closed. Raises ConfigError when it cannot
    listen where it shall.
    """

    def __init__(self, holdings: Holdings, where: Where, frontends: Collection[str], on_crash: Callable[[], None]) -> None:
        self.holdings = holdings
        #: its thread has failed
        self.has_failed = False
        self._frontends, self._on_crash = frontends, on_crash
        own = KeyPair.generate()
        self._keys = HostKeys(own, frozenset(frontends))
        listener = listen(*where.endpoints, keys=self._keys)
        self.relay = Relay(holdings.number, own, holdings.model.resilience.hang_after_ms / 1000)
        self._loop = HostLoop(holdings.bank_table, listener, self.relay, holdings.store.cache)
        self.info = HostInfo(
            name=host_name(holdings.number),
            endpoints=listener.endpoints,
            public_key=own.public,
            node=where.node,
            pid=os.getpid(),
            device=str(where.device),
            cuda_visible_devices=where.cuda_visible_devices,
            num_threads=where.num_threads,
            experts_held=len(holdings.store.experts),
            weights_bytes=holdings.store.nbytes,
            since_epoch=holdings.since_epoch,
        )
        self._thread = threading.Thread(target=self._run, args=(where.num_threads,), name=self.info.name, daemon=True)
        self._thread.start()

    @property
    def pass_time(self) -> PassTime:
        """How busy it has been."""
        return self._loop.clock.read()

    def take(self, release: Release) -> None:
        """Load the new experts of a release, while others are served. Raises ConfigError or CheckpointError, and forgets the release."""
        self.holdings.take(release)
        self.weigh()

    def withdraw(self, epoch: int) -> None:
        """Forget a withdrawn release, and all after it."""
        self.holdings.withdraw(epoch)
        self.weigh()

    def retire(self, epoch: int) -> None:
        """Forget what came before a release that all frontends use now."""
        self.holdings.retire(epoch)
        self.weigh()

    def adopt(self, release: Release) -> None:
        """Load this release and forget later ones; batches may still use earlier ones. Raises as `take`."""
        self.withdraw(release.epoch + 1)
        self.take(release)

    def meet(self, directory: Mapping[int, HostInfo], frontends: Collection[str] | None) -> None:
        """All hosts by number as they are now, and the public keys of all frontends: only these may talk to this one.

        None = the frontends it knows.
        """
        self._frontends = self._frontends if frontends is None else frontends
        self._keys.allow({*self._frontends, *(info.public_key for info in directory.values())})
        self.relay.meet(directory)

    def hold(self, until: threading.Event) -> None:
        """From any thread: as if its process were stopped until the event is set; for fault injection."""
        self._loop.hold(until)

    def stop(self) -> None:
        """Finish the pass that is running, then end."""
        self._loop.stop()
        self._thread.join()

    def weigh(self) -> None:
        """Says in `info` what it holds now."""
        store = self.holdings.store
        self.info = replace(self.info, experts_held=len(store.experts), weights_bytes=store.nbytes)

    def _run(self, num_threads: int) -> None:
        # OpenMP keeps this setting per thread, and the math libraries below torch ask OpenMP: without it every matmul of this
        # thread would be spread over all cores of the machine.
        torch.set_num_threads(num_threads)
        give_way()
        try:
            self._loop.run()
        except BaseException:
            log.exception("%s has failed", self.info.name)
            self.has_failed = True
            self._on_crash()
