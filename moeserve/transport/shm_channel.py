"""The frontend's end of shared memory: rows are written straight into an arena that the host has mapped."""

from __future__ import annotations

import asyncio
import os
import socket

import torch

from moeserve.memory import Arena, create_shared, is_same_user
from moeserve.transport.channel import Channel, ChannelClosed, Pending
from moeserve.transport.memory import Limits
from moeserve.transport.packets import PacketSocket
from moeserve.transport.timing import DIAL_RETRY_S
from moeserve.transport.wire import VERSION, Kind, Memory, PacketLayout, pack_note, partial


class ShmChannel(Channel):
    """Talks over a connected SOCK_SEQPACKET socket; one packet wakes the other side, no row goes through the kernel."""

    def __init__(self, endpoint: str, sock: socket.socket, limits: Limits, silent_after_s: float) -> None:
        fd, memory = create_shared(limits.max_pool_bytes)
        try:
            super().__init__(endpoint, Arena(memory), limits, silent_after_s)
            self._packets = PacketSocket(sock)
            socket.send_fds(sock, [pack_note(Kind.HELLO, code=VERSION, value=limits.max_pool_bytes)], [fd])
        finally:
            os.close(fd)
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def _block_bytes(self, layout: PacketLayout) -> int:
        return layout.total_bytes

    def _transmit(self, packet: bytes, sent: Pending | None) -> None:
        try:
            self._packets.send(packet)
        except OSError:
            self._lost()
            return
        if self._packets.is_full:
            self._loop.add_writer(self._packets.fileno(), self._on_writable)

    def _partial(self, sent: Pending, body: Memory | None) -> torch.Tensor:
        return partial(sent.block.memory, sent.shape, sent.layout.reply)

    def _hang_up(self) -> None:
        self._loop.remove_reader(self._packets.fileno())
        self._loop.remove_writer(self._packets.fileno())
        self._packets.close()

    def _on_readable(self) -> None:
        try:
            for packet in self._packets.receive():
                self._take_in(packet, None)
                if self.closed.is_set() or not self._unanswered:
                    return  # no more answers to come: saves reading the socket in vain
        except OSError:
            self._lost()

    def _on_writable(self) -> None:
        try:
            self._packets.flush()
        except OSError:
            self._lost()
            return
        if not self._packets.is_full:
            self._loop.remove_writer(self._packets.fileno())

    def _lost(self) -> None:
        self._die(f"the host at {self.endpoint} is gone")


async def connect_unix(endpoint: str, limits: Limits, timeout_s: float, silent_after_s: float) -> ShmChannel:
    """A channel to the host at `unix:/path`. Raises ChannelClosed when no process of this user listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(timeout_s):
            await _dial(sock, endpoint)
    except TimeoutError:
        sock.close()
        raise ChannelClosed(f"no host accepted a connection at {endpoint} within {timeout_s:g} s") from None
    except BaseException:
        sock.close()
        raise
    return await talk(endpoint, sock, limits, timeout_s, silent_after_s)


async def talk(endpoint: str, sock: socket.socket, limits: Limits, timeout_s: float, silent_after_s: float) -> ShmChannel:
    """An open channel over a connected socket. Raises ChannelClosed when the host at its other end does not accept."""
    try:
        channel = ShmChannel(endpoint, sock, limits, silent_after_s)
    except OSError as error:
        sock.close()
        raise ChannelClosed(f"cannot talk to the host at {endpoint}: {error.strerror}") from None
    await channel.open(timeout_s)
    return channel


async def _dial(sock: socket.socket, endpoint: str) -> None:
    while True:
        try:
            sock.connect(endpoint.removeprefix("unix:"))
            break
        except BlockingIOError:
            await asyncio.sleep(DIAL_RETRY_S)
        except OSError as error:
            raise ChannelClosed(f"no host listens at {endpoint}: {error.strerror}") from None
    if not is_same_user(sock):
        raise ChannelClosed(f"the host at {endpoint} belongs to another user")
