"""Stretches of memory that are lent out in blocks, and how two processes come to share one.

An arena is mapped once at its full size; pages exist from the first touch on, so an idle arena costs address space only, and one that was
busy does so again after `give_back`.
Blocks have power-of-two size classes with a free list each, last returned first lent, so a steady load stays on warm pages.
Splitting and merging is Knowlton's buddy system (1965), merging only when nothing else fits.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from moeserve.errors import Overloaded

_UCRED = struct.Struct("iII")
_SMALLEST_ORDER = 12  # one page
_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
_arenas_lock = threading.Lock()


class Block(NamedTuple):
    """Bytes `offset` to `offset + len(memory)` of an arena, at `address`; they are lent until nothing refers to `memory` any more."""

    offset: int
    memory: memoryview
    address: int


class Arena:
    """Lends blocks of `memory`, whose size is a power of two; safe to use from several threads.

    A block comes back by itself when its memoryview and every tensor over it are gone, so memory in use is never lent twice.
    """

    def __init__(self, memory: mmap.mmap, advice: int = mmap.MADV_REMOVE) -> None:
        """advice: the advice that makes the kernel take back pages of such a mapping."""
        self._mapping = memory
        self._advice = advice
        self._memory = memoryview(memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._lock = threading.Lock()
        self._lent: dict[int, tuple[int, weakref.ref[memoryview]]] = {}
        # A block may die in any thread, even inside `lend` through the garbage collector: append is atomic and takes no lock.
        self._returned: deque[int] = deque()
        self._free: list[list[int]] = [[] for _ in range(len(memory).bit_length())]
        self._free[-1].append(0)
        with _arenas_lock:
            _arenas.add(self)

    @classmethod
    def private(cls, nbytes: int) -> Arena:
        """An arena only this process sees."""
        return cls(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), mmap.MADV_DONTNEED)

    def lend(self, nbytes: int) -> Block:
        """A block of `nbytes`. Raises Overloaded when what is lent already leaves no room for it."""
        order = max(_SMALLEST_ORDER, (nbytes - 1).bit_length())
        with self._lock:
            self._take_back()
            offset = self._find(order)
            if offset is None:
                self._merge()
                offset = self._find(order)
            if offset is None:
                raise Overloaded(f"no room for a message of {nbytes} bytes beside those in flight; the pool has {len(self._memory)}")
            memory = self._memory[offset : offset + nbytes]
            returned = self._returned
            self._lent[offset] = order, weakref.ref(memory, lambda _: returned.append(offset))
        return Block(offset, memory, self._address + offset)

    def give_back(self) -> None:
        """Returns the pages of unlent memory to the kernel, as far as it takes them, until it is lent again."""
        with self._lock:
            self._take_back()
            self._merge()
            for order, offsets in enumerate(self._free):
                for offset in offsets:
                    with suppress(OSError):  # pages are locked, or the kernel cannot (gVisor): they stay
                        self._mapping.madvise(self._advice, offset, 1 << order)

    def _take_back(self) -> None:
        while self._returned:
            offset = self._returned.popleft()
            order, _ = self._lent.pop(offset)
            self._free[order].append(offset)

    def _find(self, order: int) -> int | None:
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                offset = self._free[larger].pop()
                for half in range(order, larger):
                    self._free[half].append(offset + (1 << half))
                return offset
        return None

    def _merge(self) -> None:
        for order in range(_SMALLEST_ORDER, len(self._free) - 1):
            lonely: set[int] = set()
            for offset in self._free[order]:
                buddy = offset ^ 1 << order
                if buddy in lonely:
                    lonely.remove(buddy)
                    self._free[order + 1].append(min(offset, buddy))
                else:
                    lonely.add(offset)
            self._free[order] = list(lonely)


def give_back_pools() -> None:
    """For every arena of this process: `Arena.give_back`."""
    with _arenas_lock:
        arenas = list(_arenas)
    for arena in arenas:
        arena.give_back()


class UnsafeMemory(Exception):
    """What another process sent cannot be shared."""


def create_shared(nbytes: int) -> tuple[int, mmap.mmap]:
    """A file descriptor to hand to another process, and the memory behind it. No name, no file, no /dev/shm mount; its size is final."""
    fd = os.memfd_create("moeserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd, mmap.mmap(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise


def map_shared(fd: int, nbytes: int) -> mmap.mmap:
    """The memory behind a descriptor that another process sent.

    Raises UnsafeMemory unless it has exactly `nbytes` for ever: a memory file that shrinks kills a process that reads past its end.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not sealed or os.fstat(fd).st_size != nbytes:
            raise UnsafeMemory("shared memory is not sealed or not of the announced size")
        if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
            raise UnsafeMemory("shared memory is of huge pages")  # a page that cannot be had kills, too
        return mmap.mmap(fd, nbytes)
    except (OSError, ValueError) as error:
        raise UnsafeMemory(f"shared memory cannot be mapped: {error}") from None


def is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket belonged to this process's user when it connected."""
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(uid == os.getuid())
