"""Standard output and standard error: readers that leave or do not read never change what the program does.

The standard streams are replaced once, at the start of the process, so this holds for logs, tables and progress bars of libraries, too.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Final, TextIO

from moeserve.errors import MoEServeError

#: how long a reader that does not read delays this process, once
_PATIENCE_MS: Final = 100


def tell(line: str) -> None:
    """Prints one line to standard error, at once."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Prints one line of results to standard output."""
    with suppress(OSError, ValueError, MoEServeError):
        print(line, flush=True)


def is_read() -> bool:
    """Whether the standard output may still have a reader; endless output can end otherwise."""
    raw = getattr(sys.stdout, "buffer", None)
    return not (isinstance(raw, _Output) and raw.is_closed_by_reader)


def make_safe() -> None:
    """Replaces the standard streams; closed ones become /dev/null, because files opened later would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - from now on
    sys.stdout = _Output(1).as_text(sys.stdout)
    sys.stderr = _Told(2).as_text(sys.stderr)


class _Raw(io.RawIOBase):
    """Writes everything unbuffered, so nothing is left to fail at the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def as_text(self, former: TextIO | None) -> TextIO:
        encoding = "utf-8" if former is None else former.encoding
        return io.TextIOWrapper(self, encoding, "backslashreplace", write_through=True)  # type: ignore[type-var]

    def _is_writable(self, timeout_ms: int | None) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(timeout_ms))


class _Output(_Raw):
    """Results: a reader that stops early changes nothing, but a failed write is an error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.is_closed_by_reader = False

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        written = 0
        while written < len(data) and not self.is_closed_by_reader:
            try:
                written += os.write(self._descriptor, data[written:])
            except BlockingIOError:  # another process made this pipe non-blocking
                self._is_writable(None)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that has hung up
                    raise MoEServeError(f"cannot write to the standard output: {error.strerror}") from None
                self.is_closed_by_reader = True
        return len(data)


class _Told(_Raw):
    """Messages: lost when there is no reader, or no room."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._patience_ms = _PATIENCE_MS

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        with suppress(OSError):
            for begin in range(0, len(data), select.PIPE_BUF):  # a writable pipe takes so much
                if not self._is_writable(self._patience_ms):
                    self._patience_ms = 0
                    break
                self._patience_ms = _PATIENCE_MS
                os.write(self._descriptor, data[begin : begin + select.PIPE_BUF])
        return len(data)
