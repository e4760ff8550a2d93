"""Keeps glibc from giving message buffers back to the kernel after every call.

A fresh large buffer costs a page fault per 4 KiB, more than the copy into it. By default glibc maps and unmaps every block
above 32 MiB, and any block above 128 KiB until it has learned otherwise.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from typing import Final

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

#: free memory at the end of the heap that the process keeps, at most
KEPT_BYTES: Final = 256 * 2**20
#: blocks above this are still mapped and unmapped one by one
LARGEST_KEPT_BLOCK_BYTES: Final = 64 * 2**20
_TOP_PAD_BYTES: Final = 16 * 2**20

_log: Final = logging.getLogger(__name__)


def keep_large_blocks() -> bool:
    """To be called once, early, by a process that serves: halves the time of calls of megabytes.

    Costs resident memory: up to KEPT_BYTES that are free and not given back. Returns whether it took effect; on a libc
    other than glibc it changes nothing and says so in the log.
    """
    if platform.libc_ver()[0] != "glibc":
        _log.info("allocator: not glibc, large buffers are left to the default policy")
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = (
        (_M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK_BYTES),
        (_M_TRIM_THRESHOLD, KEPT_BYTES),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
