"""Hearing at once that a process of this machine has ended, whoever has started it."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress


class ProcessEnds:
    """Wakes `wait` when a process that it watches has ended; for one event loop."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._ended = asyncio.Event()

    def watch(self, pid: int) -> None:
        """From now on, once."""
        if pid in self._files:
            return
        try:
            self._files[pid] = file = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended.set()
        except OSError:
            pass  # no more descriptors, or a kernel without: whoever waits looks from time to time anyway
        else:
            asyncio.get_running_loop().add_reader(file, self._forget, pid)

    async def wait(self, timeout_s: float) -> bool:
        """Until one ends, or has ended since the last call; False when none has within `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        has_ended = self._ended.is_set()
        self._ended.clear()
        return has_ended

    def close(self) -> None:
        """Watch none of them any more."""
        for pid in list(self._files):
            self._forget(pid)

    def _forget(self, pid: int) -> None:
        file = self._files.pop(pid)
        asyncio.get_running_loop().remove_reader(file)
        os.close(file)
        self._ended.set()
