"""Large tensors of a client on the machine of the service: through memory that both have mapped, instead of the connection.

The service must be at an address of this machine and belong to the same user. Where it cannot be done, one line of the log says so, and
tensors travel in messages.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from moeserve.addresses import parse_target
from moeserve.api.fields import SHARED
from moeserve.client.fork import FORKS
from moeserve.errors import InvalidRequest, Overloaded, UnknownLayer
from moeserve.memory import Arena, Block, create_shared, is_same_user
from moeserve.v1 import moe_service_pb2 as pb

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: below this, a message is as fast
_LARGE_BYTES: Final = 256 * 2**10
#: for all calls in progress, each with twice its hidden_states
_POOL_BYTES: Final = 256 * 2**20
#: between two attempts to share memory
_PAUSE_S: Final = 1.0
_SECONDS: Final = 5.0
#: too many callers wait there at once, or this process or its machine has too many files open
_PASSING: Final = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
_SIZE: Final = struct.Struct("<Q")
_ID_BYTES: Final = 16
#: after these the service reads and writes nothing of the call any more
_REFUSALS: Final = (InvalidRequest, Overloaded, UnknownLayer)


class Lent:
    """The memory of one call: its rows, and room for those of the answer."""

    def __init__(self, block: Block, nbytes: int, name: bytes) -> None:
        self._memory, self._nbytes = block.memory, nbytes
        self.shared = pb.SharedBlock(memory=name, offset=block.offset, reply_offset=block.offset + nbytes)

    @property
    def rows(self) -> memoryview:
        """For the bytes of the request's hidden_states."""
        return self._memory[: self._nbytes]

    @property
    def reply(self) -> memoryview:
        """With the bytes of the answer's, once it has come."""
        return self._memory[self._nbytes :]


class CallerMemory:
    """Of one client. `ask` it whether to `open` memory first; `lend` it to a call, and tell it when the call is `lost`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._is_here = parse_target(target).is_here and hasattr(os, "memfd_create")
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._try_at = 0.0
        FORKS.register(self)

    def is_wanted(self, hidden_states: torch.Tensor) -> bool:
        """Whether this tensor is large, and memory should be opened for it."""
        if not self._is_large(hidden_states) or self._opened is not None:
            return False
        with self._lock:
            now = time.monotonic()
            if now < self._try_at:
                return False
            self._try_at = now + _PAUSE_S
            return True

    def open(self, name: bytes, timeout_s: float | None) -> None:
        """`name`: the service's answer to OpenMemory. Blocks for a moment, at most half of what a call has left.

        A service that is too busy for that is asked again later, as any is where this process has no file descriptor left.
        """
        try:
            if not name:
                raise OSError("it offers none")
            self._opened = _Opened(name, _SECONDS if timeout_s is None else min(_SECONDS, timeout_s / 2))
        except OSError as error:
            if not isinstance(error, TimeoutError) and error.errno not in _PASSING:
                self.refuse(str(error))
            else:
                log.debug("large tensors travel in messages for now: the service at %s shares no memory: %s", self._target, error)

    def refuse(self, why: str) -> None:
        """Tensors travel in messages from now on."""
        self._is_here = False
        log.warning("no memory is shared with the service at %s, so large tensors travel in messages: %s", self._target, why)

    def lend(self, hidden_states: torch.Tensor) -> Lent | None:
        """Memory for a call; None = its tensors travel in the message."""
        opened = self._opened
        if opened is None or not self._is_large(hidden_states):
            return None
        if opened.process != os.getpid():  # this one was forked from it
            self._opened = None
            return None
        nbytes = hidden_states.numel() * hidden_states.itemsize
        try:
            return Lent(opened.arena.lend(2 * nbytes), nbytes, opened.name)
        except Overloaded:
            return None

    def lost(self, lent: Lent, error: BaseException) -> bool:
        """The call has failed. Returns whether the service does not know the memory, so the call should be made without it.

        Where the service may still be at work on the call, the memory is not used again.
        """
        is_unknown = isinstance(error, InvalidRequest) and any(one.field == SHARED for one in error.violations)
        if is_unknown or not isinstance(error, _REFUSALS):
            with self._lock:
                if self._opened is not None and self._opened.name == lent.shared.memory:
                    self._opened, self._try_at = None, time.monotonic() + (_PAUSE_S if is_unknown else 0)
        return is_unknown

    def close(self) -> None:
        """Shares nothing any more."""
        self._opened, self._is_here = None, False

    def in_child(self) -> None:
        """This process was forked: whoever held the lock is not here."""
        self._lock = threading.Lock()

    def _is_large(self, hidden_states: torch.Tensor) -> bool:
        return self._is_here and hidden_states.numel() * hidden_states.itemsize >= _LARGE_BYTES

    def __reduce__(self) -> tuple[type[CallerMemory], tuple[str]]:
        return CallerMemory, (self._target,)


class _Opened:
    """Memory that the service has mapped; when nothing refers to this, the service forgets it. Raises OSError."""

    def __init__(self, name: bytes, timeout_s: float) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(timeout_s)
            sock.connect(b"\0" + name)
            if not is_same_user(sock):
                raise OSError("it belongs to another user")
            fd, memory = create_shared(_POOL_BYTES)
            try:
                socket.send_fds(sock, [_SIZE.pack(_POOL_BYTES)], [fd])
            finally:
                os.close(fd)
            self.name = sock.recv(_ID_BYTES)
            if len(self.name) != _ID_BYTES:
                raise OSError("it refused")
        except BaseException:
            sock.close()
            raise
        self.arena = Arena(memory)
        self.process = os.getpid()
        weakref.finalize(self, sock.close)
