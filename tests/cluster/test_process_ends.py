"""The end of a process is heard at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from moeserve.cluster.process_ends import ProcessEnds

WAITS = [sys.executable, "-c", "input()"]


def watched(*processes: subprocess.Popen[bytes]) -> int:
    """Descriptors that this process has for these; others that run in it may have some for others."""
    lines = {f"Pid:\t{process.pid}" for process in processes}
    found = 0
    for file in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            found += not lines.isdisjoint(file.read_text().splitlines())
    return found


def test_the_end_of_a_process_is_heard_at_once_and_only_once() -> None:
    async def hear(first: subprocess.Popen[bytes], second: subprocess.Popen[bytes]) -> None:
        ends = ProcessEnds()
        for process, host in ((first, 0), (second, 1), (first, 0)):
            ends.watch(process.pid, host)
        assert not await ends.wait(0.01) and watched(first, second) == 2
        first.send_signal(signal.SIGKILL)
        assert await ends.wait(60) == {0}
        assert not await ends.wait(0.01)
        first.wait()
        ends.watch(first.pid, 0)  # it has ended before anybody asked
        assert await ends.wait(60) == {0}
        ends.close()
        assert watched(first, second) == 0

    with subprocess.Popen(WAITS, stdin=subprocess.PIPE) as first, subprocess.Popen(WAITS, stdin=subprocess.PIPE) as second:
        asyncio.run(hear(first, second))
