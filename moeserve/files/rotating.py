"""Files that are replaced while in use: certificates and tokens expire."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Final, Generic, TypeVar

from moeserve.errors import MoEServeError

log = logging.getLogger(__name__)

#: the least time between two checks of the files
LOOK_S: Final = 1.0
#: a file that was written more recently may have been written again since, and look the same
_STABLE_NS: Final = 2_000_000_000

T = TypeVar("T")
#: the identity of a file at a path, behind symbolic links; None = there is no file
_Version = tuple[int, int, int, int] | None


class Rotating(Generic[T]):
    """The result of `load` for the files at `paths`, loaded again when they change; from any thread.

    If new files cannot be used (half written, for example), the old result stays in force, with one log line. Raises the error of `load`
    raises the first time.
    """

    def __init__(self, paths: Sequence[Path | None], load: Callable[[], T]) -> None:
        self._paths = [path for path in paths if path is not None]
        self._load = load
        self._lock = Lock()
        self._complaint = ""
        self._seen = self._look()
        self._value = load()
        self._looked_at = time.monotonic()

    def current(self) -> T:
        """The current result; checks the files once a second at most."""
        if self._paths and time.monotonic() - self._looked_at >= LOOK_S:
            with self._lock:
                self._looked_at = time.monotonic()
                self._renew()
        return self._value

    def _renew(self) -> None:
        seen = self._look()
        if seen == self._seen and _is_stable(seen):
            return
        self._seen = seen
        try:
            self._value = self._load()
        except MoEServeError as error:
            if str(error) != self._complaint:
                log.warning("the files read before stay in force: %s", error)
            self._complaint = str(error)
        else:
            self._complaint = ""

    def _look(self) -> list[_Version]:
        return [_version(path) for path in self._paths]


def _version(path: Path) -> _Version:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)


def _is_stable(versions: Sequence[_Version]) -> bool:
    return all(version is not None and version[3] < time.time_ns() - _STABLE_NS for version in versions)
