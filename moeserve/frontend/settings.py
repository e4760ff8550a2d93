"""What a frontend is told when it is made, beside what it serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from moeserve.config import BatchingConfig, CommunicationConfig, CopyChoice, FrontendConfig, ResilienceConfig, ServerConfig
from moeserve.observe.stats import HostInfo
from moeserve.transport import KeyPair


@dataclass(frozen=True)
class FrontendSettings:
    """How requests are served: under the name of `model`, and with at most `max_queued_tokens` tokens that wait."""

    model: str
    batching: BatchingConfig
    communication: CommunicationConfig
    resilience: ResilienceConfig
    copy_choice: CopyChoice
    max_queued_tokens: int

    @classmethod
    def of(cls, config: FrontendConfig, server: ServerConfig) -> FrontendSettings:
        """`config` is what all frontends of a service do alike, `server` is its own."""
        copy_choice = config.placement.copy_choice
        return cls(config.model_name, config.batching, config.communication, config.resilience, copy_choice, server.max_queued_tokens)


@dataclass(frozen=True)
class HostAccess:
    """How hosts are reached: `find` tells of the present incarnation of one by its number, `keys` are shown to those on other nodes.

    `on_health` is told, whenever it may have changed, of every layer (by number) whether each of its experts has a live copy.
    """

    find: Callable[[int], Awaitable[HostInfo]]
    keys: KeyPair
    on_health: Callable[[int, bool], None]
