"""The settings of a frontend, beside its release."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from moeserve.config import BatchingConfig, CommunicationConfig, CopyChoice, FrontendConfig, ResilienceConfig, ServerConfig
from moeserve.observe.stats import HostInfo
from moeserve.transport import KeyPair


@dataclass(frozen=True)
class FrontendSettings:
    """How requests are served: under the name of `model`, and with at most `max_queued_tokens` tokens that wait.

    `resilience_of` a layer of a name may differ from `resilience` in what happens to lost choices. spills: hosts have not all of their
    experts in memory.
    """

    model: str
    batching: BatchingConfig
    communication: CommunicationConfig
    resilience: ResilienceConfig
    resilience_of: Callable[[str], ResilienceConfig]
    copy_choice: CopyChoice
    max_queued_tokens: int
    spills: bool = False

    @classmethod
    def of(cls, config: FrontendConfig, server: ServerConfig) -> FrontendSettings:
        """`config` is what all frontends of a service do alike, `server` is its own."""
        return cls(
            model=config.model_name,
            batching=config.batching,
            communication=config.communication,
            resilience=config.resilience,
            resilience_of=config.resilience_of,
            copy_choice=config.placement.copy_choice,
            max_queued_tokens=server.max_queued_tokens,
            spills=config.store.spill is not None,
        )


@dataclass(frozen=True)
class HostAccess:
    """How hosts are reached: `find` returns the current incarnation of a host by number; `keys` are for hosts on other nodes.

    `on_health` is called after every possible change: for each layer (by number), whether all of its experts have a live copy.
    """

    find: Callable[[int], Awaitable[HostInfo]]
    keys: KeyPair
    on_health: Callable[[int, bool], None]
