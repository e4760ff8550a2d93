"""What is told to people and what is put out: whether somebody reads it never decides what happens.

The standard streams of the process are replaced once, at its start, so this holds for logs, tables and progress bars of libraries, too.
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

#: how long a reader who does not read holds this process up, once
_PATIENCE_MS: Final = 100


def tell(line: str) -> None:
    """One line for whoever started this, at once."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """One line of what has been done, on the standard output."""
    with suppress(OSError, ValueError, MoEServeError):
        print(line, flush=True)


def is_read() -> bool:
    """Somebody may still read the standard output: what would go on putting out for ever can end otherwise."""
    raw = getattr(sys.stdout, "buffer", None)
    return not (isinstance(raw, _Output) and raw.is_closed_by_reader)


def make_safe() -> None:
    """Replace the standard streams, and put /dev/null in the place of closed ones: files opened later would be taken for them."""
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
    """Writes all of what it is given, unbuffered, so that nothing is left to fail at the end of the process."""

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
    """What the verb is for: a reader who has had enough ends nothing, but what cannot be written is an error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.is_closed_by_reader = False

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        written = 0
        while written < len(data) and not self.is_closed_by_reader:
            try:
                written += os.write(self._descriptor, data[written:])
            except BlockingIOError:  # somebody who has the same pipe made it so
                self._is_writable(None)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that has hung up
                    raise MoEServeError(f"the standard output cannot be written: {error.strerror}") from None
                self.is_closed_by_reader = True
        return len(data)


class _Told(_Raw):
    """What is lost when nobody reads it, or there is no room for it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._patience_ms = _PATIENCE_MS

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        with suppress(OSError):
            for begin in range(0, len(data), select.PIPE_BUF):  # so much goes into a pipe that can be written to
                if not self._is_writable(self._patience_ms):
                    self._patience_ms = 0
                    break
                self._patience_ms = _PATIENCE_MS
                os.write(self._descriptor, data[begin : begin + select.PIPE_BUF])
        return len(data)
