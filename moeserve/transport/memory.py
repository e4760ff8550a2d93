"""How much memory a channel may use."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final

from moeserve.errors import ConfigError

_SMALLEST_POOL_BYTES: Final = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Limits:
    """max_message_bytes: request and reply of one message together. max_pool_bytes: all messages in flight on one channel.

    Raises ConfigError unless the pool is a power of two and holds at least one message.
    """

    max_message_bytes: int = 512 * 2**20
    max_pool_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.max_pool_bytes < _SMALLEST_POOL_BYTES or self.max_pool_bytes & (self.max_pool_bytes - 1):
            raise ConfigError(f"max_pool_bytes must be a power of two and at least {_SMALLEST_POOL_BYTES}, got {self.max_pool_bytes}")
        if not 0 < self.max_message_bytes <= self.max_pool_bytes:
            raise ConfigError(f"max_message_bytes must be in 1..{self.max_pool_bytes} (max_pool_bytes), got {self.max_message_bytes}")
