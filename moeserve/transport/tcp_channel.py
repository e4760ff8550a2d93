"""The frontend's end of TCP: a ZeroMQ DEALER on the asyncio loop, frames without a copy, a monitor that sees the host die."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from moeserve.errors import ConfigError
from moeserve.memory import Arena
from moeserve.transport.channel import Channel, Pending
from moeserve.transport.keys import FrontendKeys
from moeserve.transport.memory import Limits
from moeserve.transport.readiness import has_message
from moeserve.transport.tcp_line import TcpLine
from moeserve.transport.timing import FRONTEND_LINGER_MS, HEARTBEAT_S, TCP_CONNECT_MS
from moeserve.transport.wire import VERSION, Kind, MalformedMessage, Memory, PacketLayout, aligned, pack_note, partial

#: milliseconds until libzmq itself closes a connection whose pings are not answered: SilenceWatch decides that
_NEVER_MS = 2**31 - 1
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_ENDS = {
    zmq.EVENT_DISCONNECTED: "is gone",
    zmq.EVENT_CLOSED: "cannot be reached",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "does not know this frontend's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "does not use the keys this frontend expects",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "disconnected during the handshake: the keys do not match",
}


class TcpChannel(Channel):
    """Talks to `tcp://address:port`, encrypted and authenticated when keys are given."""

    def __init__(self, endpoint: str, limits: Limits, keys: FrontendKeys | None, silent_after_s: float) -> None:
        super().__init__(endpoint, Arena.private(limits.max_pool_bytes), limits, silent_after_s)
        self._line: TcpLine | None = None
        self._socket = _dealer(limits, keys)
        self._socket.ipv6 = "[" in endpoint
        self._monitor = self._socket.get_monitor_socket(sum(_ENDS) | zmq.EVENT_CONNECTED)
        self._monitor.linger = 0
        self._loop.add_reader(self._socket.FD, self._on_readable)
        self._loop.add_reader(self._monitor.FD, self._on_monitor)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._hang_up()
            raise ConfigError(f"{endpoint} is not an address to connect to: {error.strerror}") from None
        self._on_monitor()  # a socket that was never checked for messages does not signal its first one
        self._transmit(pack_note(Kind.HELLO, code=VERSION), None)

    def last_heard(self) -> float:
        """When any byte came, of an answer or of one that libzmq's thread gives to pings."""
        line = 0.0 if self._line is None else self._line.last_heard()
        return max(super().last_heard(), line)

    def _block_bytes(self, layout: PacketLayout) -> int:
        return layout.request_bytes

    def _transmit(self, packet: bytes, sent: Pending | None) -> None:
        frames: list[bytes | memoryview] = [packet] if sent is None else [packet, sent.block.memory]
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            self._die(f"the host at {self.endpoint} is gone")
            return
        if has_message(self._socket):
            self._loop.call_soon(self._on_readable)

    def _partial(self, sent: Pending, body: Memory | None) -> torch.Tensor:
        if body is None or len(body) != sent.shape.rows * sent.shape.hidden_size * 4:
            raise MalformedMessage(f"reply of {len(body or b'')} bytes does not fit the rows sent")
        return partial(body, sent.shape, 0)

    def _hang_up(self) -> None:
        self._loop.remove_reader(self._socket.FD)
        self._loop.remove_reader(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close()
        if self._line is not None:
            self._line.close()
        # Told so, a ROUTER forgets this frontend before its connection ends.
        with suppress(zmq.ZMQError):
            self._socket.send(pack_note(Kind.GOODBYE), zmq.NOBLOCK)
        self._socket.close(FRONTEND_LINGER_MS)

    def _on_readable(self) -> None:
        while not self.closed.is_set() and has_message(self._socket):
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            self._take_in(frames[0].bytes, aligned(frames[1].buffer) if len(frames) > 1 else None)

    def _on_monitor(self) -> None:
        while not self.closed.is_set() and has_message(self._monitor):
            message = recv_monitor_message(self._monitor)
            event = zmq.Event(message["event"])
            if event is zmq.EVENT_CONNECTED:
                self._watch_line(message["value"])
                continue
            # The host's last messages come first, above all why it disconnected.
            self._on_readable()
            self._die(f"the host at {self.endpoint} {_ENDS[event]}")

    def _watch_line(self, fd: int) -> None:
        try:
            self._line = TcpLine(fd)
        except OSError as error:  # without it, a host that computes would seem to be silent
            if error.errno in _NO_DESCRIPTOR:
                self._die(f"the connection to {self.endpoint} cannot be watched: {error.strerror}")
            # else it has disconnected since: that is the next event


def _dealer(limits: Limits, keys: FrontendKeys | None) -> zmq.Socket[Any]:
    context: zmq.Context[zmq.Socket[Any]] = zmq.Context.instance()
    context.max_sockets = context.get(zmq.SOCKET_LIMIT)  # a channel has three; the rule is 1023, for all channels of a process
    dealer: zmq.Socket[Any] = context.socket(zmq.DEALER)
    dealer.reconnect_ivl = -1
    dealer.connect_timeout = TCP_CONNECT_MS
    dealer.heartbeat_ivl = int(HEARTBEAT_S * 1000)
    dealer.heartbeat_timeout = _NEVER_MS
    dealer.sndhwm = 0
    dealer.maxmsgsize = limits.max_message_bytes
    if keys is not None:
        dealer.curve_publickey = keys.own.public.encode()
        dealer.curve_secretkey = keys.own.secret.encode()
        dealer.curve_serverkey = keys.host.encode()
    return dealer


async def connect_tcp(endpoint: str, limits: Limits, timeout_s: float, keys: FrontendKeys | None, silent_after_s: float) -> TcpChannel:
    """A channel to the host at `tcp://address:port`. Raises ChannelClosed when it cannot be reached or refuses these keys."""
    channel = TcpChannel(endpoint, limits, keys, silent_after_s)
    await channel.open(timeout_s)
    return channel
