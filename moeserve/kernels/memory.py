"""Memory for the weights of a bank: one mapping, on huge pages if the system has free ones."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable

import torch

_ALIGNMENT = 64
_local = threading.local()


class WeightArena:
    """`nbytes` of zeros that tensors are cut from, one after the other, each aligned to a cache line; freed with the last of them.

    A kernel that maps memory in pages of 4 KiB spends a third of the time of reading weights once on looking pages up. Where pages of
    2 MiB are given only on request (transparent_hugepage = madvise), this requests them.
    """

    def __init__(self, nbytes: int) -> None:
        mapping = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._used = 0

    @property
    def room(self) -> int:
        """The bytes that are left."""
        return len(self._memory) - self._used

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[size] zeros; None when there is no room."""
        end = self._used + size * dtype.itemsize
        if end > len(self._memory):
            return None
        taken = self._memory[self._used : end].view(dtype)
        self._used = min(aligned(end), len(self._memory))
        return taken


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
