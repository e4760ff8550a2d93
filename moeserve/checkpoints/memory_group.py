"""What the kernel lets the processes of this memory control group have: a container's limit, or a supervisor's; versions 1 and 2."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class _Files:
    """Names of one version's files, and the key of the page cache that the kernel gives back when memory is short."""

    limit: str
    usage: str
    events: str
    cache: str


_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control", "total_inactive_file")
_V2: Final = _Files("memory.max", "memory.current", "memory.events", "inactive_file")
#: version 1 has no word for "none"
_NO_LIMIT_BYTES: Final = 2**60


class MemoryGroup:
    """The group of this process and those it is in. `proc`: where the kernel says which these are."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        #: from the innermost on: a folder and how its files are called
        self._levels = list(_levels(proc))

    @property
    def limit_bytes(self) -> int | None:
        """The least of all limits; None = there is none."""
        return min((limit for limit, _ in self._limits()), default=None)

    @property
    def free_bytes(self) -> int | None:
        """What is left below the limits, the page cache counted as free; None = there is no limit."""
        return min((max(0, limit - used) for limit, used in self._limits()), default=None)

    @property
    def oom_kills(self) -> int:
        """How many processes of this group the kernel has ended so far, because memory was short."""
        for folder, files in self._levels[:1]:
            return _number(folder / files.events, r"^oom_kill (\d+)$") or 0
        return 0

    def _limits(self) -> Iterator[tuple[int, int]]:
        """Limit and use of each level that has a limit."""
        for folder, files in self._levels:
            limit = _number(folder / files.limit)
            if limit is not None and limit < _NO_LIMIT_BYTES:
                used = _number(folder / files.usage) or 0
                yield limit, used - (_number(folder / "memory.stat", rf"^{files.cache} (\d+)$") or 0)


def _levels(proc: Path) -> Iterator[tuple[Path, _Files]]:
    with suppress(OSError):
        groups = dict(_groups(_lines(proc / "cgroup")))
        for mount, root, controllers in _mounts(_lines(proc / "mountinfo")):
            files = _V1 if "memory" in controllers else _V2
            group = groups.get("memory" if files is _V1 else "")
            innermost = None if group is None else mount / group.removeprefix(root).lstrip("/")
            if innermost is None or not innermost.is_dir():
                innermost = mount  # a container that sees its own group as the root, and is told the name it has outside
            for folder in (innermost, *innermost.parents):
                if not folder.is_relative_to(mount):
                    break
                if (folder / files.usage).exists() or (folder / files.events).exists():
                    yield folder, files


def _lines(file: Path) -> list[str]:
    """Names in them may hold any bytes, and what counts as the end of a line elsewhere."""
    return [line for line in os.fsdecode(file.read_bytes()).split("\n") if line]


def _groups(cgroup: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Controller and path of the group; "" = that of version 2."""
    for line in cgroup:
        _, controllers, path = line.split(":", 2)
        yield from ((controller, path) for controller in controllers.split(","))


def _mounts(mountinfo: Iterable[str]) -> Iterator[tuple[Path, str, list[str]]]:
    """Where memory may be controlled: the mount, which group its root is, and its options."""
    for line in mountinfo:
        where, _, what = line.partition(" - ")
        kind, _, options = what.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            root, mount = where.split(" ")[3:5]
            yield Path(mount), root, options.split(",")


def _number(file: Path, pattern: str = r"^(\d+)$") -> int | None:
    """None where there is no such file, or no number in it."""
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])
