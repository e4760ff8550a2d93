"""Regions of POSIX shared memory that callers have registered.

A region is a file that its owner may change, cut off or remove at any time. So it is never mapped: a page that is gone would end this
process (SIGBUS), and numbers that change after they were checked could be anything. What is asked for is copied, by the kernel, which says
when it is not there.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from moeserve.api.protobuf import Buffer
from moeserve.errors import InvalidRequest, Overloaded, PermissionDenied, UnknownLayer

_FOLDER: Final = Path("/dev/shm")  # noqa: S108  # where shm_open has its objects
_MAX_REGIONS: Final = 256
_MAX_NAME: Final = 255

Transfer = Callable[[int, Sequence[memoryview], int], int]


class Region:
    """A part of one object; its file is open for as long as anybody uses it."""

    def __init__(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Raises InvalidRequest when there is no such object or it is too small, PermissionDenied when it is another user's."""
        self.name, self.key, self.offset, self.nbytes = name, key, offset, nbytes
        self._fd = _open(key)
        weakref.finalize(self, os.close, self._fd)
        about = os.fstat(self._fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise PermissionDenied(f"shared memory {key[:80]!r} is not an object of the user that the service runs as")
        if offset + nbytes > about.st_size:
            raise InvalidRequest(
                f"region {name!r} ends at byte {offset + nbytes} of shared memory {key[:80]!r}, which has {about.st_size}", "byte_size"
            )

    def require(self, offset: int, nbytes: int) -> None:
        """Raises InvalidRequest when these bytes are not all in the region."""
        if offset + nbytes > self.nbytes:
            raise InvalidRequest(f"region {self.name!r} has {self.nbytes} bytes; {nbytes} from {offset} on are asked for")

    def read(self, offset: int, nbytes: int) -> bytearray:
        """A copy of these bytes. Raises InvalidRequest when they are not there any more."""
        self.require(offset, nbytes)
        found, done = bytearray(nbytes), 0
        with memoryview(found) as whole:
            while done < nbytes:
                count = self._count(os.preadv, [whole[done:]], self.offset + offset + done)
                if not count:
                    raise self._cut_off()
                done += count
        return found

    def write(self, offset: int, data: Buffer) -> None:
        """Raises InvalidRequest when there is no room for `data`."""
        self.require(offset, len(data))
        whole, done, start = memoryview(data), 0, self.offset + offset
        if start + len(whole) > os.fstat(self._fd).st_size:
            raise self._cut_off()
        while done < len(whole):
            done += self._count(os.pwritev, [whole[done:]], start + done)

    def _count(self, transfer: Transfer, buffers: Sequence[memoryview], at: int) -> int:
        try:
            return transfer(self._fd, buffers, at)
        except OSError as error:
            raise InvalidRequest(f"region {self.name!r} cannot be used: {error.strerror}") from None

    def _cut_off(self) -> InvalidRequest:
        return InvalidRequest(f"shared memory {self.key[:80]!r} of region {self.name!r} is smaller than when it was registered")


class Regions:
    """By name. The names are shared by all callers that may use shared memory."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Raises InvalidRequest, PermissionDenied, and Overloaded when there are too many."""
        if not 0 < len(name) <= _MAX_NAME or not nbytes:
            raise InvalidRequest(f"a region needs a name of 1..{_MAX_NAME} characters and a byte_size above 0", "name")
        if name in self._regions:
            raise InvalidRequest(f"region {name!r} is registered already; unregister it first", "name")
        if len(self._regions) >= _MAX_REGIONS:
            raise Overloaded(f"{_MAX_REGIONS} regions of shared memory are registered, as many as are allowed", None)
        self._regions[name] = Region(name, key, offset, nbytes)

    def unregister(self, name: str) -> None:
        """All with "". A name that is not registered is no error."""
        for each in [name] if name else list(self._regions):
            self._regions.pop(each, None)

    def listed(self, name: str) -> list[Region]:
        """All with "". Raises UnknownLayer, which is NOT_FOUND."""
        if name and name not in self._regions:
            raise UnknownLayer(f"there is no region {name[:80]!r} of shared memory")
        return [self._regions[name]] if name else list(self._regions.values())

    def find(self, name: str) -> Region:
        """Raises InvalidRequest."""
        if name not in self._regions:
            raise InvalidRequest(f"region {name[:80]!r} of shared memory is not registered", "shared_memory_region")
        return self._regions[name]


def _open(key: str) -> int:
    name = key.removeprefix("/")
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > _MAX_NAME:
        raise InvalidRequest(f"key {key[:80]!r} is no name of POSIX shared memory; allowed: one name, with or without a / in front", "key")
    try:
        # No link is followed, and a pipe in that folder is not waited for.
        return os.open(_FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise PermissionDenied(f"the service may not use shared memory {key[:80]!r}") from None
    except OSError as error:
        raise InvalidRequest(f"shared memory {key[:80]!r} cannot be opened: {error.strerror}", "key") from None
