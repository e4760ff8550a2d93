"""Reading files that may be anything."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from moeserve.log_limit import limited_logger

strangers: Final = limited_logger(__name__)

_MAX_SECRET_BYTES: Final = 2**20
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a file. Raises OSError, whose `strerror` is for users.

    It also raises for anything but a file: opening a pipe may never return, and a device has no end.
    """
    try:
        # A pipe without a writer is opened at once.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError:
        raise _not_a_name(path) from None
    with open(descriptor, "rb") as file:
        _require_regular(os.fstat(descriptor), path)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"It has more than {max_bytes} bytes", str(path))
    return data


def read_secret(path: Path) -> bytes:
    """The content of a file with a token or a key. Raises OSError, as `read_file`, also if every user of this machine can write it.

    It warns about a file that every user can read, unless root owns it, as in a volume of Kubernetes.
    """
    status = require_file(path)
    if status.st_mode & stat.S_IWOTH:
        raise PermissionError(errno.EPERM, "Every user of this machine can write it: chmod 600", str(path))
    is_given = status.st_uid == 0 != os.geteuid()
    if status.st_mode & stat.S_IROTH and not is_given:
        strangers.warning("%s holds a secret, and every user of this machine can read it: chmod 600", path, extra={"kind": str(path)})
    return read_file(path, _MAX_SECRET_BYTES)


def require_file(path: Path) -> os.stat_result:
    """Raises OSError, whose `strerror` is for people, unless `path` is a file, or leads to one."""
    return _require_regular(_status(path), path)


def require_folder(path: Path) -> None:
    """Raises OSError, whose `strerror` is for people, unless `path` is a folder, or leads to one."""
    status = _status(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, f"It is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a file')}, not a folder", str(path))


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError:
        raise _not_a_name(path) from None


def _require_regular(status: os.stat_result, path: Path) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"It is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, not a file", str(path))
    return status


def _not_a_name(path: Path) -> OSError:
    return OSError(errno.EINVAL, "No file can have this name", str(path))
