"""Memory for the weights of experts: in few mappings, on huge pages if the system has free ones."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import torch

_ALIGNMENT = 64
_local = threading.local()


class WeightArena:
    """`nbytes` of zeros that tensors are cut from, one after the other, each aligned to a cache line.

    The memory of a tensor goes back to the system with the last that shares it, whatever else is in the arena.

    A kernel that maps memory in pages of 4 KiB spends a third of the time of reading weights once on looking pages up. Where pages of
    2 MiB are given only on request (transparent_hugepage = madvise), this requests them.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._used = max(nbytes, 1), 0
        self._mapping = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system may have no huge pages at all
            self._mapping.madvise(mmap.MADV_HUGEPAGE)

    @property
    def room(self) -> int:
        """The bytes that are left."""
        return self._nbytes - self._used

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[size] zeros; None when there is no room."""
        first, end = self._used, self._used + size * dtype.itemsize
        if end > self._nbytes:
            return None
        self._used = min(aligned(end), self._nbytes)
        # Tensors hold this array, not the mapping: it ends with the last of them.
        taken = np.frombuffer(self._mapping, dtype=np.uint8, count=end - first, offset=first)
        # At the end of the process the system takes all of it, and something may still compute.
        weakref.finalize(taken, _give_back, self._mapping, first, end).atexit = False
        return torch.from_numpy(taken).view(dtype)


class WeightArenas:
    """Arenas for `count` experts that come one after the other: one for all of them if they are of one size."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._arena: WeightArena | None = None

    def arena(self, nbytes: int) -> WeightArena:
        """For the next expert, with room for so many bytes."""
        if self._arena is None or self._arena.room < nbytes:
            self._arena = WeightArena(nbytes * max(1, self._left))
        self._left -= 1
        return self._arena


def _give_back(mapping: mmap.mmap, first: int, end: int) -> None:
    """The whole pages in between; neighbors have a part of the others."""
    first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


def arena_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes that tensors take in an arena."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def aligned(nbytes: int) -> int:
    """The bytes that a tensor of so many bytes takes in an arena."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def scratch(nbytes: int) -> torch.Tensor:
    """A buffer of at least so many bytes, for this thread until its next call; kept, because fresh memory costs page faults."""
    kept: torch.Tensor | None = getattr(_local, "scratch", None)
    if kept is None or len(kept) < nbytes:
        kept = _local.scratch = torch.empty(nbytes, dtype=torch.uint8)
    return kept
