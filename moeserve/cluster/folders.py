"""Folders that only this user can look into; those of processes that were killed are removed by the next one.

A user of a folder holds a lock on a file in it. The kernel releases it at the end of the process: a folder with a free lock is abandoned.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Final

from moeserve.errors import ConfigError

log = logging.getLogger(__name__)

_PREFIX: Final = "moeserve-"
_LOCK: Final = ".moeserve"
#: sockaddr_un.sun_path of Linux, less the zero at its end
_SOCKET_PATH_BYTES: Final = 107
_LONGEST_HOST_SOCKET: Final = "host-99999-9999999.sock"
_RANDOM_BYTES: Final = 8  # that mkdtemp adds to a name
#: tried after TMPDIR: they are short, and the end of a login session does not remove them
_FURTHER_PLACES: Final = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # noqa: S108


class Hold:
    """The folder at `path`, made if needed; it is kept until `let_go`, or the end of this process.

    Raises ConfigError when it belongs to another user, or is not private, and OSError when it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)

    def let_go(self) -> None:
        """Remove the folder unless another process holds it, too. Idempotent."""
        if self._lock is not None:
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child that was forked off may have the file open still
            os.close(self._lock)
            self._lock = None
            remove_abandoned(self.path)


def hold_new(longest_socket: str, chosen: Path | None = None) -> Hold:
    """A folder with a new name in `chosen`, or in the first place where `longest_socket`, a path within it, is short enough for a socket.

    Raises ConfigError when there is no such place.
    """
    place = find_place(len(_PREFIX) + _RANDOM_BYTES + 1 + len(longest_socket), chosen)
    try:
        return Hold(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place)))
    except OSError as error:
        raise ConfigError(f"no folder can be made in {place}: {error.strerror}; set ray.temp_dir to another folder") from None


@dataclass(frozen=True)
class SocketFolder:
    """Where the hosts of a service have their sockets: in a folder of this name on each node, which is found there, or in a private one."""

    name: str
    chosen: Path | None = None
    within: Path | None = None

    def path(self) -> Path:
        """On this node. Raises ConfigError when there is no place for it."""
        if self.within is not None:
            return self.within / self.name
        name = f"{_PREFIX}{self.name}"
        return find_place(len(name) + 1 + len(_LONGEST_HOST_SOCKET), self.chosen) / name


def find_place(room_bytes: int, chosen: Path | None = None) -> Path:
    """Where paths have `room_bytes` left after a "/" when they are to be sockets. Raises ConfigError when there is no such place."""
    most_bytes = _SOCKET_PATH_BYTES - room_bytes - 1
    if chosen is not None:
        chosen = chosen.absolute()
        if len(os.fsencode(chosen)) > most_bytes:
            raise ConfigError(
                f"ray.temp_dir is {str(chosen)!r}; allowed: at most {most_bytes} bytes, as paths of sockets in it are limited"
            )
        if not _is_usable(chosen):
            raise ConfigError(f"ray.temp_dir is {str(chosen)!r}; allowed: a folder that exists and can be written to")
        return chosen
    first, *others = dict.fromkeys(_places())
    for place in (first, *others):
        if len(os.fsencode(place)) <= most_bytes and _is_usable(place):
            if place != first:
                log.warning(
                    "%s is too long for the paths of sockets (at most %d bytes), or cannot be used: they are in %s",
                    first,
                    most_bytes,
                    place,
                )
            return place
    raise ConfigError(f"none of {first}, {', '.join(map(str, others))} can be used for sockets; set ray.temp_dir to another folder")


def remove_all_abandoned(chosen: Path | None = None) -> None:
    """Removes the folders of this user's killed processes."""
    for place in {*_places(), *([chosen] if chosen else [])}:
        with suppress(OSError):
            for path in place.glob(f"{_PREFIX}*"):
                remove_abandoned(path)


def remove_abandoned(path: Path) -> None:
    """Remove the folder if it is this user's and no process holds it; leaves everything else, above all links."""
    with suppress(OSError):
        if not is_private(path):
            return
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, path / _LOCK):
                rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def is_private(path: Path) -> bool:
    """Whether it is a private folder of this user."""
    made = path.lstat()
    return stat.S_ISDIR(made.st_mode) and made.st_uid == os.geteuid() and not made.st_mode & 0o077


def _lock(path: Path) -> int | None:
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        if not is_private(path):
            raise ConfigError(f"{path} belongs to another user or is not private (mode 0700); sockets need a private folder")
        with suppress(FileNotFoundError):  # removed meanwhile, as it was abandoned until now
            lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            with suppress(OSError):  # a file system without locks: no process can lock it to remove it, either
                fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_at(lock, path / _LOCK):
                return lock
            os.close(lock)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _is_usable(place: Path) -> bool:
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _places() -> Iterator[Path]:
    with suppress(FileNotFoundError):  # none that it knows can be written to
        yield Path(tempfile.gettempdir())
    yield from _FURTHER_PLACES
