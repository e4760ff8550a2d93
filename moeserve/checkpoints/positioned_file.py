"""A file of a checkpoint that is read at positions, never mapped.

A page of a mapped file that has been cut off ends this process (SIGBUS), and one that is there counts as memory of the host long after it
was copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeserve.errors import CheckpointError
from moeserve.files import require_file


class PositionedFile:
    """The file that was there when this was made, read from any number of threads. Raises OSError when there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = _version(require_file(path))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A file descriptor for `fill`. Raises CheckpointError unless the file is the same before and after."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read any more: {error.strerror}") from None
        try:
            self._must_be_the_same(descriptor)
            yield descriptor
            self._must_be_the_same(descriptor)
        finally:
            os.close(descriptor)

    def fill(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        """With the bytes from `offset` on. Raises CheckpointError where the file ends or cannot be read, as without its server."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
            if not count:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            done += count

    def _must_be_the_same(self, descriptor: int) -> None:
        if _version(os.fstat(descriptor)) != self._version:
            raise CheckpointError(f"{self.path} changed while the checkpoint was read; load it again when no process writes to it")


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
