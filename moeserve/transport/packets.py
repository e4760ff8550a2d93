"""A unix SOCK_SEQPACKET socket that never blocks, and the checks that keep other users off it."""

from __future__ import annotations

import os
import socket
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.transport.wire import MAX_PACKET_BYTES, MalformedMessage

_MAX_PATH_BYTES = 107  # sockaddr_un.sun_path less its final NUL


class PacketSocket:
    """Sends small packets in order; packets that the socket cannot take now wait here for `flush`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._waiting: deque[bytes] = deque()

    @property
    def is_full(self) -> bool:
        """Whether packets wait for the socket to become writable."""
        return bool(self._waiting)

    def fileno(self) -> int:
        """For pollers."""
        return self._sock.fileno()

    def send(self, packet: bytes) -> None:
        """Never blocks. Raises OSError when the peer is gone."""
        if self._waiting:
            self._waiting.append(packet)
            return
        try:
            self._sock.send(packet)
        except BlockingIOError:
            self._waiting.append(packet)

    def send_if_room(self, packet: bytes) -> None:
        """Now or never, even when the peer is gone; from any thread while the socket is not closed."""
        if not self._waiting:
            with suppress(OSError):
                self._sock.send(packet)

    def flush(self) -> None:
        """Sends waiting packets, as far as the socket takes them. Raises OSError when the peer is gone."""
        with suppress(BlockingIOError):
            while self._waiting:
                self._sock.send(self._waiting[0])
                self._waiting.popleft()

    def receive(self) -> Iterator[bytes]:
        """Every packet that has arrived. Raises OSError when the peer is gone."""
        while True:
            try:
                packet = self._sock.recv(MAX_PACKET_BYTES + 1)
            except BlockingIOError:
                return
            if not packet:
                raise ConnectionResetError("end of stream")
            yield packet

    def receive_with_fd(self) -> tuple[bytes, int]:
        """The first packet and the one file descriptor that must come with it.

        Raises BlockingIOError when nothing has arrived, another OSError when the peer is gone, MalformedMessage without exactly one.
        """
        packet, fds, flags, _ = socket.recv_fds(self._sock, MAX_PACKET_BYTES + 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not packet and not fds:
            raise ConnectionResetError("end of stream")
        if len(fds) != 1 or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise MalformedMessage("the first packet must bring one file descriptor")
        return packet, fds[0]

    def close(self) -> None:
        """Drops waiting packets."""
        self._sock.close()


def listen_on(path: Path) -> socket.socket:
    """A listening socket at `path`, which only this user can reach; a stale socket there is replaced.

    Raises ConfigError unless the folder is private (0700, ours), the path is short enough and free.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ConfigError(f"the socket path {path} is longer than the {_MAX_PATH_BYTES} bytes that unix sockets allow")
    folder = path.parent.stat() if path.parent.is_dir() else None
    if folder is None or folder.st_uid != os.getuid() or stat.S_IMODE(folder.st_mode) & 0o077:
        raise ConfigError(f"the folder of the socket {path} must exist, belong to this user and have mode 0700")
    if path.is_socket():
        path.unlink()
    elif path.exists():
        raise ConfigError(f"{path} exists and is not a socket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror}") from None
    return sock
