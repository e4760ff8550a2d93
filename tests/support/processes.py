"""Processes as the kernel shows them: those that a test has started, and theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def moeserve(*argv: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, with its standard error as a pipe unless `options` of Popen say something else; killed if it is still there."""
    command = [sys.executable, "-m", "moeserve", *argv]
    process = subprocess.Popen(command, **{"stderr": subprocess.PIPE, "text": True, **options})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    """Children of the process, and theirs."""
    parents = {int(path.name): parent for path in Path("/proc").iterdir() if path.name.isdigit() and (parent := _parent(path)) is not None}
    found, todo = [], [pid]
    while todo:
        of = todo.pop()
        found += (mine := [child for child, parent in parents.items() if parent == of])
        todo += mine
    return found


def running(pids: Iterable[int]) -> dict[int, str]:
    """Those that have not ended, and what they are called."""
    lines = ((pid, Path(f"/proc/{pid}/stat")) for pid in pids)
    states = ((pid, _read(path).rpartition(")")) for pid, path in lines)
    return {pid: name for pid, (name, _, rest) in states if rest and rest.split()[0] not in "ZX"}


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """As a control group is ended: every process gets it, in whatever order."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def command_lines(pids: Iterable[int]) -> dict[int, list[str]]:
    """The arguments of those that run: one that has ended meanwhile has none."""
    found = ((pid, _read(Path(f"/proc/{pid}/cmdline"))) for pid in pids)
    return {pid: text.removesuffix("\0").split("\0") for pid, text in found if text}


def blocks(pid: int, number: signal.Signals) -> bool:
    """The main thread of the process blocks this signal, as `moeserve` does from its start."""
    return _blocks(_read(Path(f"/proc/{pid}/status")), number)


def open_threads(pid: int, number: signal.Signals) -> int:
    """How many threads of the process may get this signal."""
    found = map(_read, Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(not _blocks(status, number) for status in found if status)


def _blocks(status: str, number: signal.Signals) -> bool:
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def _parent(path: Path) -> int | None:
    rest = _read(path / "stat").rpartition(")")[2].split()
    return int(rest[1]) if rest else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""
