"""Ends the processes of a local Ray and removes its folder when the process that started it is gone, for any reason.

A script of its own that imports nothing of the project. Ray's own agents would stay for a minute: each first tries to tell its server,
which is gone, too, that its raylet is.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_END_TIMEOUT_S: Final = 10.0
_LOOK_S: Final = 0.01


def end_processes(folder: Path) -> None:
    """Kill the descendants of the raylet with its files in `folder`, until none is left."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while (found := _heirs(folder)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


def _heirs(folder: Path) -> list[int]:
    """The processes that have inherited its log: all of them, and no others."""
    log = re.compile(rf"{re.escape(str(folder))}/.*/logs/raylet\.")
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and any(map(log.match, _open_files(pid)))]


def _open_files(pid: str) -> Iterator[str]:
    files = f"/proc/{pid}/fd"
    with suppress(OSError):  # it is another user's, or has ended
        for name in os.listdir(files):
            with suppress(OSError):  # closed meanwhile
                yield os.readlink(f"{files}/{name}")


def _keep(folder: Path) -> None:
    sys.stdin.buffer.read()  # until the process with the other end is gone
    end_processes(folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
