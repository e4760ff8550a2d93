"""File descriptors of this process: what is open, and a while in which there is none left."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

#: standard input, output and error
_ALWAYS_OPEN: Final = 3


def open_files() -> set[tuple[str, str]]:
    """Numbers, and what they stand for: that of a file that earlier tests have left may be another's soon."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@contextmanager
def no_free_descriptors() -> Iterator[None]:
    """Those that are open stay so; what is closed meanwhile, as what earlier tests have left, makes no room."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_ALWAYS_OPEN, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
