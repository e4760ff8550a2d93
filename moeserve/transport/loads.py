"""How often the experts of a host that spills were in memory."""

from __future__ import annotations

from typing import NamedTuple


class Loads(NamedTuple):
    """How many experts passes have used since a host started, each once in a pass, and how many of them had to be read first."""

    used: int = 0
    read: int = 0

    def packed(self) -> int:
        """Both in 64 bits; they begin again at 2^32, as if the host had."""
        return self.used % 2**32 << 32 | self.read % 2**32

    @classmethod
    def unpacked(cls, value: int) -> Loads:
        """What `packed` has made."""
        return cls(value >> 32, value % 2**32)
