"""Files that nobody can open for a while, as on a file system that does not answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Whoever opens a file of which another process has the lease waits until that is given back, at most 45 s.
_HOLD = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, lambda *_: print("wanted", flush=True))
fcntl.fcntl(os.open(sys.argv[1], os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def hanging(path: Path) -> Iterator[Callable[[], None]]:
    """Meanwhile, who opens the file waits; what is yielded waits for the first to do so."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            pytest.skip(f"the file system of {path} has no leases")
        lines = holder.stdout

        def until_wanted() -> None:
            assert lines.readline() == "wanted\n"

        yield until_wanted
        holder.communicate()
