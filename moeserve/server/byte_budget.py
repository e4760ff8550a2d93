"""What the service keeps in memory for its callers, in bytes: counted as tokens are, and bounded like them."""

from __future__ import annotations

from typing import Final

from moeserve.errors import Overloaded

_MIB: Final = 2**20


class ByteBudget:
    """Messages that were read and are not answered yet, and answers that their callers have not taken yet, of all calls together.

    `bytes` is their sum. Answers are made whatever it says, so it may be above `max_bytes` for a while; then nothing more is read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether anything more may be read."""
        return self.room > 0

    @property
    def room(self) -> int:
        """How many bytes more it allows; below zero after large answers."""
        return self._max_bytes - self.bytes

    def require_room(self) -> None:
        """Raises Overloaded when nothing more may be read."""
        if not self.has_room:
            raise self._full("so nothing more is read")

    def take(self, nbytes: int, own: int = 0) -> None:
        """Counts a message that was read. Raises Overloaded when it does not fit; alone it always does. `own`: of it, counted already."""
        if self.bytes > own and self.bytes + nbytes > self._max_bytes:
            raise self._full(f"and a message of {nbytes} more does not fit")
        self.bytes += nbytes

    def add(self, nbytes: int) -> None:
        """Counts what is there in any case; a negative number is what is gone."""
        self.bytes += nbytes
        assert self.bytes >= 0, "what is gone was there"

    def _full(self, consequence: str) -> Overloaded:
        return Overloaded(
            f"{self.bytes // _MIB} MiB of messages and answers are under way; server.max_queued_bytes is {self._max_bytes}, {consequence}; "
            "try again"
        )
