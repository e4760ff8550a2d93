"""The host's end of TCP: one ZeroMQ ROUTER for all frontends on other nodes.

A ROUTER cannot disconnect one frontend: a refused one gets GOODBYE and is ignored from then on.
"""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from moeserve.api.tensors import raw
from moeserve.errors import ConfigError
from moeserve.memory import Arena
from moeserve.transport.keys import HostKeys, ZapHandler
from moeserve.transport.listener import Poller
from moeserve.transport.memory import Limits
from moeserve.transport.peer import Peer
from moeserve.transport.readiness import has_message
from moeserve.transport.timing import FRONTEND_GONE_MS, HOST_LINGER_MS
from moeserve.transport.wire import Kind, MalformedMessage, Memory, PacketLayout, WorkHeader, aligned, partial
from moeserve.transport.work import Work

#: between two TCP keepalive probes of an idle connection
_KEEPALIVE_S = 1
#: messages of one frontend that may wait while the host computes; with more, libzmq stops reading and answers no pings either
_MAX_WAITING = 2**16


class TcpSource:
    """Listens at `tcp://address:port`, port 0 = any free one; without keys only on a loopback address.

    Raises ConfigError when it may not or cannot listen there.
    """

    def __init__(self, endpoint: str, limits: Limits, poller: Poller, arrived: list[Work], keys: HostKeys | None) -> None:
        if keys is None and not _is_loopback(endpoint):
            raise ConfigError(f"{endpoint} is not a loopback address: listening there needs CURVE keys")
        self._limits = limits
        self._poller = poller
        self._arrived = arrived
        self._context = zmq.Context()
        self._keys = keys
        self._zap = ZapHandler(self._context, keys) if keys is not None else None
        self._router = self._bind(endpoint, keys)
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replies = Arena.private(limits.max_pool_bytes)
        self._peers: dict[bytes, TcpPeer] = {}
        for sock in self._sockets():
            poller.add(sock.FD, lambda _: self.catch_up())
        poller.add(self._monitor.FD, lambda _: self._forget_disconnected())
        self._forget_disconnected()  # a socket that was never checked for messages does not signal its first one

    def catch_up(self) -> None:
        if self._zap is not None:
            self._zap.answer()
        while has_message(self._router):
            identity, *frames = self._router.recv_multipart(copy=False)
            self._take_in(identity.bytes, frames)

    def owes(self) -> bool:
        return any(peer.owes for peer in list(self._peers.values()))

    def beat(self) -> None:
        """Nothing to do: libzmq's own thread answers the pings of frontends."""

    def tell(self, packet: bytes) -> None:
        for identity in list(self._peers):
            self.send(identity, packet, None)

    def send(self, identity: bytes, packet: bytes, body: memoryview | None) -> None:
        """Never blocks; a frontend that is gone is forgotten."""
        try:
            self._router.send_multipart([identity, packet] if body is None else [identity, packet, body], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            self._forget(identity)

    def close(self) -> None:
        self._router.disable_monitor()
        for sock in (self._monitor, *self._sockets()):
            self._poller.remove(sock.FD)
            sock.close()
        for peer in self._peers.values():
            peer.lose()
        self._context.term()

    def _sockets(self) -> list[Any]:
        return [self._router] if self._zap is None else [self._router, self._zap.socket]

    def _bind(self, endpoint: str, keys: HostKeys | None) -> Any:
        router = self._context.socket(zmq.ROUTER)
        router.linger = HOST_LINGER_MS
        router.ipv6 = "[" in endpoint
        router.router_mandatory = True
        router.sndhwm = 0
        router.rcvhwm = _MAX_WAITING
        router.tcp_keepalive = 1
        router.tcp_keepalive_idle = router.tcp_keepalive_intvl = _KEEPALIVE_S
        router.tcp_keepalive_cnt = FRONTEND_GONE_MS // 1000 // _KEEPALIVE_S
        router.tcp_maxrt = FRONTEND_GONE_MS
        router.maxmsgsize = self._limits.max_message_bytes
        if keys is not None:
            router.curve_server = True
            router.curve_secretkey = keys.own.secret.encode()
            router.zap_domain = b"moeserve"
        try:
            router.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot listen on {endpoint}: {error.strerror}") from None
        return router

    def _take_in(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        peer = self._peers.get(identity)
        is_new = peer is None
        if peer is None:
            # Descriptors are reused: frontends that disconnected before this one connected are forgotten first.
            self._forget_disconnected()
            peer = self._peers[identity] = TcpPeer(self, identity, self._limits, self._arrived, self._sender(frames[0]))
        packet = frames[0].bytes if len(frames) in (1, 2) else b""
        try:
            if packet and packet[0] == Kind.GOODBYE:
                self._forget(identity)
            elif peer.is_refused:
                return
            elif self._keys is not None and peer.sender.key not in self._keys.allowed:
                raise MalformedMessage("its key was withdrawn")
            elif is_new:
                peer.greet(packet)
            else:
                peer.take_in(packet, aligned(frames[1].buffer) if len(frames) == 2 else None)
        except MalformedMessage as error:
            peer.refuse(str(error))

    def _sender(self, frame: zmq.Frame) -> Sender:
        return Sender(int(frame.get("__fd")), str(frame.get("User-Id")) if self._keys is not None else "")

    def _forget_disconnected(self) -> None:
        while has_message(self._monitor):
            fd = recv_monitor_message(self._monitor)["value"]
            for identity in [identity for identity, peer in self._peers.items() if peer.sender.fd == fd]:
                self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        peer = self._peers.pop(identity, None)
        if peer is not None:
            peer.lose()


class Sender(NamedTuple):
    """Where a message came from: libzmq's descriptor of the connection, and the authenticated public key ("" without keys)."""

    fd: int
    key: str


class TcpPeer(Peer):
    """One frontend, known by the identity the ROUTER gave its connection."""

    def __init__(self, source: TcpSource, identity: bytes, limits: Limits, arrived: list[Work], sender: Sender) -> None:
        super().__init__(source.endpoint, limits, arrived)
        self._source = source
        self._identity = identity
        self.sender = sender
        self.is_refused = False

    def refuse(self, reason: str) -> None:
        super().refuse(reason)
        self.is_refused = True
        self.lose()

    def reply_buffer(self, work: Work) -> torch.Tensor:
        shape = work.header.shape
        block = self._source.replies.lend(shape.rows * shape.hidden_size * 4)
        return partial(block.memory, shape, 0)

    def _place(self, header: WorkHeader, layout: PacketLayout, body: Memory | None) -> tuple[Memory, int]:
        if body is None or len(body) != layout.request_bytes:
            raise MalformedMessage(f"work of {layout.request_bytes} bytes came with {len(body or b'')}")
        return body, 0

    def _transmit(self, packet: bytes, partial: torch.Tensor | None) -> None:
        self._source.send(self._identity, packet, None if partial is None else raw(partial))


def _is_loopback(endpoint: str) -> bool:
    address = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
