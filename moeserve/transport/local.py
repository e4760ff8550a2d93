"""Hosts in this very process, found by name: the shared-memory channel over a socket pair. For tests and single-process use."""

from __future__ import annotations

import os
import socket
from collections import deque
from threading import Lock

from moeserve.errors import ConfigError
from moeserve.transport.channel import ChannelClosed
from moeserve.transport.listener import Poller
from moeserve.transport.memory import Limits
from moeserve.transport.shm_channel import ShmChannel, talk
from moeserve.transport.shm_source import ShmPeers
from moeserve.transport.work import Work

_sources: dict[str, LocalSource] = {}


class LocalSource:
    """Listens at `local:name`. Raises ConfigError when the name is taken."""

    def __init__(self, endpoint: str, limits: Limits, poller: Poller, arrived: list[Work]) -> None:
        self.endpoint = endpoint
        self._poller = poller
        self._peers = ShmPeers(endpoint, limits, poller, arrived)
        self._connecting: deque[socket.socket] = deque()
        #: who rings the bell must not find that of somebody else: numbers of files that are closed are used again
        self._lock = Lock()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if _sources.setdefault(endpoint, self) is not self:
            os.close(self._bell)
            raise ConfigError(f"this process already listens at {endpoint}")
        poller.add(self._bell, lambda _: self._accept())

    def catch_up(self) -> None:
        """Nothing to do: its file descriptors stay readable until they are read."""

    def owes(self) -> bool:
        return self._peers.owes()

    def beat(self) -> None:
        self._peers.beat()

    def tell(self, packet: bytes) -> None:
        self._peers.tell(packet)

    def dial(self) -> socket.socket:
        """A socket connected to this host; from any thread. Raises ChannelClosed when it does not listen any more."""
        with self._lock:
            if _sources.get(self.endpoint) is not self:
                raise ChannelClosed(f"no host listens at {self.endpoint}")
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._connecting.append(theirs)
            os.eventfd_write(self._bell, 1)
        return ours

    def close(self) -> None:
        with self._lock:
            del _sources[self.endpoint]
        self._poller.remove(self._bell)
        os.close(self._bell)
        while self._connecting:
            self._connecting.popleft().close()
        self._peers.close()

    def _accept(self) -> None:
        os.eventfd_read(self._bell)
        while self._connecting:
            self._peers.add(self._connecting.popleft())


def is_in_this_process(endpoint: str) -> bool:
    """Whether a host listens at `local:name` here."""
    return endpoint in _sources


async def connect_local(endpoint: str, limits: Limits, timeout_s: float, silent_after_s: float) -> ShmChannel:
    """A channel to the host at `local:name`. Raises ChannelClosed when nothing in this process listens there."""
    source = _sources.get(endpoint)
    if source is None:
        raise ChannelClosed(f"no host listens at {endpoint}")
    return await talk(endpoint, source.dial(), limits, timeout_s, silent_after_s)
