"""Freed memory of a serving process: how much it keeps, and when it returns the rest (settings of glibc).

A fresh large buffer costs a page fault per 4 KiB, more than the copy into it. By default glibc maps and unmaps every block above 32 MiB,
and any block above 128 KiB until it has learned otherwise. What it keeps, it keeps in up to eight arenas per core: what one thread has
freed is not used again by the next, and the end of an arena other than the first is never given back, even when the process asks for it.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import resource
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8

#: free memory at the end of the heap that the process keeps while it works, at most
KEPT_BYTES: Final = 256 * 2**20
#: blocks above this are still mapped and unmapped one by one
LARGEST_KEPT_BLOCK_BYTES: Final = 64 * 2**20
_TOP_PAD_BYTES: Final = 16 * 2**20

# A process is quiet when it used less than this share of a core for so many ticks in a row: then memory is given back, and again later, as
# what callers leave behind that did nothing for long is freed without much work. One that is never quiet gives back once it has grown by so
# much since the last time, but not more often than it would when quiet: giving back takes time, and so does having it again.
_TICK_S: Final = 0.5
_QUIET_SHARE: Final = 0.1
_QUIET_TICKS: Final = 3
_TICKS_BETWEEN: Final = 20
_GROWN_BYTES: Final = KEPT_BYTES

_log: Final = logging.getLogger(__name__)


def keep_large_blocks() -> bool:
    """Call it once, early, in a serving process: halves the time of calls of megabytes.

    Costs actor memory while there is work: up to KEPT_BYTES that are free at the end of the heap, and whatever is free below. There is
    one arena then, unless threads were started before. Returns whether it took effect; on a libc other than glibc it changes nothing and
    says so in the log.
    """
    if not _is_glibc():
        _log.info("allocator: not glibc, large buffers are left to the default policy")
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK_BYTES),
        (_M_TRIM_THRESHOLD, KEPT_BYTES),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)


def give_back_when_quiet(*give_back: Callable[[], object]) -> None:
    """From now on, call `give_back` and return glibc's free pages.

    This happens whenever the process was quiet for 1.5 s, and, however busy it is, after large messages. It takes some 40 ms for half a
    gigabyte, which is why it waits. To be called once.
    """
    steps = (*give_back, _trim) if _is_glibc() else give_back
    threading.Thread(target=_watch, args=(steps,), name="give-back", daemon=True).start()


def _watch(steps: Sequence[Callable[[], object]]) -> None:
    used_s, quiet_ticks, ticks, least_bytes = time.process_time(), 0, 0, _rss_bytes()
    while True:
        time.sleep(_TICK_S)
        used_s, before_s = time.process_time(), used_s
        quiet_ticks = quiet_ticks + 1 if used_s - before_s < _QUIET_SHARE * _TICK_S else 0
        ticks, least_bytes = ticks + 1, min(least_bytes, _rss_bytes())
        has_grown = ticks >= _TICKS_BETWEEN and _rss_bytes() - least_bytes > _GROWN_BYTES
        if has_grown or quiet_ticks % _TICKS_BETWEEN == _QUIET_TICKS:
            for step in steps:
                step()
            ticks, least_bytes = 0, _rss_bytes()


def _rss_bytes() -> int:
    """0 = this system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
