"""Memory that callers on this machine share with the service, so that large tensors need not pass through a connection.

A caller makes the memory and hands over its descriptor on a unix socket, of which only authenticated callers hear. The kernel says whose
the socket's other end is: only the user of this process may share. The memory has no name, cannot shrink, and is forgotten when the socket
closes, as it does when the caller ends. A caller could change rows while they are computed, which can make its own answer wrong: nothing
else is read from there.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable
from math import prod
from typing import Final

from moeserve.api.fields import SHARED
from moeserve.api.tensors import WIRE_DTYPES
from moeserve.errors import InvalidRequest
from moeserve.log_limit import limited_logger
from moeserve.memory import UnsafeMemory, is_same_user, map_shared
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2

#: of all callers together; further ones send their tensors in messages
MAX_MEMORIES: Final = 64
MAX_MEMORY_BYTES: Final = 2**30
#: for a caller that has connected to say what it shares
_GREETING_S: Final = 5.0
#: until callers are accepted again, where this process has no file descriptor for them
_PAUSE_S: Final = 0.5
_SIZE: Final = struct.Struct("<Q")
_ID_BYTES: Final = 16

_strangers: Final = limited_logger(__name__)


class Memories:
    """Of one server; belongs to its event loop. `open` listens."""

    def __init__(self) -> None:
        #: of the socket, in the abstract namespace; empty = it does not listen
        self.name = b""
        self._listening: socket.socket | None = None
        self._guests: set[_Guest] = set()
        self._known: dict[bytes, mmap.mmap] = {}

    def open(self) -> None:
        """Listens, where this system has such sockets."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        name = f"moeserve-{secrets.token_hex(16)}".encode()
        try:
            listening.bind(b"\0" + name)
            listening.listen(MAX_MEMORIES)
        except OSError:
            listening.close()
            return
        self._listening, self.name = listening, name
        asyncio.get_running_loop().add_reader(listening.fileno(), self._accept)

    def close(self) -> None:
        """Forgets all memory; what a running call uses stays until it ends. Idempotent."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening.fileno())
            self._listening.close()
            self._listening, self.name = None, b""
        for guest in list(self._guests):
            guest.leave()

    def block(self, shared: pb.SharedBlock, rows: tensor_pb2.Tensor) -> tuple[memoryview, memoryview]:
        """The bytes of the request's hidden_states, and the place for those of the answer's. Raises InvalidRequest."""
        memory = self._known.get(shared.memory)
        if memory is None:
            raise InvalidRequest("this memory is not shared with this process", SHARED)
        dtype = WIRE_DTYPES.get(rows.dtype)
        nbytes = 0 if dtype is None else dtype.itemsize * prod(rows.shape)
        places = shared.offset, shared.reply_offset
        if not 0 <= nbytes <= len(memory) - max(places):
            raise InvalidRequest(f"{nbytes} bytes do not lie at {list(places)} in memory of {len(memory)}", SHARED)
        whole = memoryview(memory)
        return whole[shared.offset :][:nbytes].toreadonly(), whole[shared.reply_offset :][:nbytes]

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            while True:
                sock, _ = self._listening.accept()
                if len(self._guests) >= MAX_MEMORIES or not is_same_user(sock):
                    _strangers.warning("a caller may not share memory: it belongs to another user, or %d do already", len(self._guests))
                    sock.close()
                else:
                    self._guests.add(_Guest(sock, self._let_in, self._forget))
        except BlockingIOError:
            pass
        except OSError as error:
            # Who waits is not taken off the socket, which stays readable.
            _strangers.warning("a caller that would share memory cannot be accepted now: %s", error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listening.fileno())
            loop.call_later(_PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        if self._listening is not None:
            asyncio.get_running_loop().add_reader(self._listening.fileno(), self._accept)

    def _let_in(self, memory: mmap.mmap) -> bytes:
        name = secrets.token_bytes(_ID_BYTES)
        self._known[name] = memory
        return name

    def _forget(self, guest: _Guest) -> None:
        self._guests.discard(guest)
        self._known.pop(guest.name, None)


class _Guest:
    """One caller that shares memory, or is about to."""

    def __init__(self, sock: socket.socket, let_in: Callable[[mmap.mmap], bytes], forget: Callable[[_Guest], None]) -> None:
        sock.setblocking(False)
        self.name = b""
        self._sock, self._let_in, self._forget = sock, let_in, forget
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._on_readable)
        self._patience = self._loop.call_later(_GREETING_S, self.leave)

    def leave(self) -> None:
        if self._sock.fileno() >= 0:
            self._patience.cancel()
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._forget(self)

    def _on_readable(self) -> None:
        try:
            packet, fds, _, _ = socket.recv_fds(self._sock, _SIZE.size, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            packet, fds = b"", []
        try:
            if self.name or len(packet) != _SIZE.size or len(fds) != 1:
                self.leave()
                return
            self._map(packet, fds[0])
        finally:
            for fd in fds:
                os.close(fd)

    def _map(self, packet: bytes, fd: int) -> None:
        (nbytes,) = _SIZE.unpack(packet)
        try:
            if not 0 < nbytes <= MAX_MEMORY_BYTES:
                raise UnsafeMemory(f"memory of {nbytes} bytes; at most {MAX_MEMORY_BYTES} may be shared")
            memory = map_shared(fd, nbytes)
            self.name = self._let_in(memory)
            self._sock.send(self.name)
        except (UnsafeMemory, OSError) as error:
            _strangers.warning("a caller may not share memory: %s", error)
            self.leave()
        else:
            self._patience.cancel()
