"""Hearing at once that a process of this machine has ended, whoever has started it."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress


class ProcessEnds:
    """Wakes `wait` when a process that it watches has ended; for one event loop."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._ended: set[int] = set()
        self._has_ended = asyncio.Event()

    def watch(self, pid: int, host: int) -> None:
        """From now on, once; `host` is the number of the host whose process it is."""
        if pid in self._files:
            return
        try:
            self._files[pid] = file = os.pidfd_open(pid)
        except ProcessLookupError:
            self._say(host)
        except OSError:
            pass  # no more descriptors, or a kernel without: whoever waits looks from time to time anyway
        else:
            asyncio.get_running_loop().add_reader(file, self._hear, pid, host)

    async def wait(self, timeout_s: float) -> frozenset[int]:
        """The hosts whose processes have ended since the last call, as soon as one has; none when none does within `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_ended.wait(), timeout_s)
        ended = frozenset(self._ended)
        self._ended.clear()
        self._has_ended.clear()
        return ended

    def close(self) -> None:
        """Watch none of them any more."""
        for pid in list(self._files):
            self._forget(pid)

    def _hear(self, pid: int, host: int) -> None:
        self._forget(pid)
        self._say(host)

    def _forget(self, pid: int) -> None:
        file = self._files.pop(pid)
        asyncio.get_running_loop().remove_reader(file)
        os.close(file)

    def _say(self, host: int) -> None:
        self._ended.add(host)
        self._has_ended.set()
