"""The settings of a frontend, beside its release."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from moeserve.config import BatchingConfig, CommunicationConfig, CopyChoice, FrontendConfig, ResilienceConfig, ServerConfig
from moeserve.observe.stats import HostInfo
from moeserve.transport import KeyPair


@dataclass(frozen=True)
class FrontendSettings:
    """How requests are served: as `model`, with at most `max_queued_tokens` queued tokens."""

    model: str
    batching: BatchingConfig
    communication: CommunicationConfig
    resilience: ResilienceConfig
    copy_choice: CopyChoice
    max_queued_tokens: int

    @classmethod
    def of(cls, config: FrontendConfig, server: ServerConfig) -> FrontendSettings:
        """`config` is shared by all frontends of a service, `server` is its own."""
        copy_choice = config.placement.copy_choice
        return cls(config.model_name, config.batching, config.communication, config.resilience, copy_choice, server.max_queued_tokens)


@dataclass(frozen=True)
class HostAccess:
    """How hosts are reached: `find` returns the current incarnation of a host by number; `keys` are for hosts on other nodes.

    `on_health` is called after every possible change: for each layer (by number), whether all of its experts have a live copy.
    """

    find: Callable[[int], Awaitable[HostInfo]]
    keys: KeyPair
    on_health: Callable[[int, bool], None]
