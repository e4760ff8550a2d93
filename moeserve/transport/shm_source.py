"""The host's end of shared memory: a unix socket for wake-ups, rows and answers in the frontend's arena.

A frontend could still change a block after it was checked. It belongs to the same user, so the checks are against mistakes.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moeserve.log_limit import limited_logger
from moeserve.memory import UnsafeMemory, is_same_user, map_shared
from moeserve.transport.listener import Poller
from moeserve.transport.memory import Limits
from moeserve.transport.packets import PacketSocket, listen_on
from moeserve.transport.peer import Peer
from moeserve.transport.timing import ACCEPT_RETRY_S
from moeserve.transport.wire import BareMessage, Kind, MalformedMessage, Memory, PacketLayout, WorkHeader, pack_note, partial, unpack_note
from moeserve.transport.work import Work

_strangers = limited_logger(__name__)
_HEARTBEAT = pack_note(Kind.HEARTBEAT)


class ShmSource:
    """Listens at `unix:/path`; the path lies in a private folder and is removed on close.

    Raises ConfigError when the path cannot be used.
    """

    def __init__(self, endpoint: str, limits: Limits, poller: Poller, arrived: list[Work]) -> None:
        self.endpoint = endpoint
        self._path = Path(endpoint.removeprefix("unix:"))
        self._listening = listen_on(self._path)
        self._poller = poller
        self._peers = ShmPeers(endpoint, limits, poller, arrived)
        #: monotonic seconds: until when no frontend is accepted; None = they are
        self._pauses_until: float | None = None
        poller.add(self._listening.fileno(), lambda _: self._accept())

    def catch_up(self) -> None:
        if self._pauses_until is not None and time.monotonic() >= self._pauses_until:
            self._pauses_until = None
            self._poller.add(self._listening.fileno(), lambda _: self._accept())

    def owes(self) -> bool:
        return self._peers.owes()

    def beat(self) -> None:
        self._peers.beat()

    def tell(self, packet: bytes) -> None:
        self._peers.tell(packet)

    def close(self) -> None:
        if self._pauses_until is None:
            self._poller.remove(self._listening.fileno())
        self._listening.close()
        self._path.unlink(missing_ok=True)
        self._peers.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # As for want of file descriptors: who waits is not taken off the socket, which stays readable.
                _strangers.warning("cannot accept a frontend at %s now: %s", self.endpoint, error)
                self._poller.remove(self._listening.fileno())
                self._pauses_until = time.monotonic() + ACCEPT_RETRY_S
                return
            self._peers.add(sock)


class ShmPeers:
    """The connected frontends of one endpoint."""

    def __init__(self, endpoint: str, limits: Limits, poller: Poller, arrived: list[Work]) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._poller = poller
        self._arrived = arrived
        self._peers: set[ShmPeer] = set()
        # Held while another thread sends heartbeats: no descriptor is closed, and reused for something else, meanwhile.
        self._lock = threading.Lock()

    def owes(self) -> bool:
        """Whether a frontend waits for an answer; from any thread."""
        with self._lock:
            return any(peer.owes for peer in self._peers)

    def beat(self) -> None:
        """Sends every frontend a heartbeat; from any thread."""
        self.tell(_HEARTBEAT)

    def tell(self, packet: bytes) -> None:
        """Sends every frontend a note; from any thread."""
        with self._lock:
            for peer in self._peers:
                peer.tell(packet)

    def add(self, sock: socket.socket) -> None:
        """Takes over a connected socket, unless it comes from another user."""
        if not is_same_user(sock):
            _strangers.warning("disconnected a frontend at %s: it belongs to another user", self._endpoint)
            sock.close()
            return
        peer = ShmPeer(self._endpoint, self._limits, self._arrived, sock, self._poller, self.let_go)
        with self._lock:
            self._peers.add(peer)

    def let_go(self, peer: ShmPeer) -> None:
        """Its socket is about to be closed."""
        with self._lock:
            self._peers.discard(peer)

    def close(self) -> None:
        for peer in list(self._peers):
            peer.hang_up()


class ShmPeer(Peer):
    """One frontend and its arena."""

    def __init__(
        self,
        endpoint: str,
        limits: Limits,
        arrived: list[Work],
        sock: socket.socket,
        poller: Poller,
        let_go: Callable[[ShmPeer], None],
    ) -> None:
        super().__init__(endpoint, limits, arrived)
        self._poller = poller
        self._let_go = let_go
        self._packets = PacketSocket(sock)
        self._arena: mmap.mmap | None = None
        self._is_greeted = False
        poller.add(sock.fileno(), self._on_events)

    def reply_buffer(self, work: Work) -> torch.Tensor:
        assert self._arena is not None
        return partial(self._arena, work.header.shape, work.header.offset + work.layout.reply)

    def hang_up(self) -> None:
        if self.is_gone:
            return
        self.lose()
        self._let_go(self)
        self._poller.remove(self._packets.fileno())
        self._packets.close()

    def tell(self, packet: bytes) -> None:
        """Sends a note that may be lost; from any thread while the socket is open."""
        if self._is_greeted:
            self._packets.send_if_room(packet)

    def _on_events(self, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                self._packets.flush()
                self._poller.watch_writable(self._packets.fileno(), self._packets.is_full)
            if self._arena is None:
                self._greet()
            for packet in self._packets.receive():
                self.take_in(packet, None)
                if self.is_gone:
                    return
        except BlockingIOError:
            return
        except OSError:
            self.hang_up()
        except MalformedMessage as error:
            self.refuse(str(error))
            self.hang_up()

    def _greet(self) -> None:
        packet, fd = self._packets.receive_with_fd()
        try:
            self._arena = self._map(unpack_note(packet), fd)
        finally:
            os.close(fd)
        self.greet(packet)
        self._is_greeted = True

    def _map(self, hello: BareMessage, fd: int) -> mmap.mmap:
        if not 0 < hello.value <= self._limits.max_pool_bytes:
            raise MalformedMessage(f"pool of {hello.value} bytes; at most {self._limits.max_pool_bytes} are allowed")
        try:
            return map_shared(fd, hello.value)
        except UnsafeMemory as error:
            raise MalformedMessage(str(error)) from None

    def _place(self, header: WorkHeader, layout: PacketLayout, body: Memory | None) -> tuple[Memory, int]:
        assert self._arena is not None
        if header.offset % mmap.PAGESIZE or header.offset + layout.total_bytes > len(self._arena):
            raise MalformedMessage(f"block at {header.offset} of {layout.total_bytes} bytes does not lie in the shared arena")
        return self._arena, header.offset

    def _transmit(self, packet: bytes, partial: torch.Tensor | None) -> None:
        try:
            self._packets.send(packet)
        except OSError:
            self.hang_up()
            return
        if self._packets.is_full:
            self._poller.watch_writable(self._packets.fileno(), True)
