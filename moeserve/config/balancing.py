"""How experts and their copies follow the load."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moeserve.config.table import Table
from moeserve.config.values import MAX_HOSTS, Bytes, Hosts, Seconds


class BalancingConfig(Table):
    """[balancing]: experts that callers ask for often get more copies, and hosts about equal work."""

    #: whether that happens by itself; `moeserve rebalance` does it once
    enabled: bool = False
    #: how many more physical than logical experts there may be, as a share: 0.25 = a quarter more
    extra_copies: float = Field(default=0.0, ge=0, le=MAX_HOSTS)
    #: copies of every expert at least, on different hosts
    min_copies: Hosts = 1
    #: of the requests that count, 95% are younger than that
    window_s: Annotated[Seconds, Field(gt=0)] = 60.0
    #: between two rounds
    interval_s: Annotated[Seconds, Field(gt=0)] = 30.0
    #: by what share the load of a layer's busiest host must fall for experts to move
    min_gain: float = Field(default=0.05, ge=0, le=1)
    #: what hosts read at most before the next step of a round, or one expert if that is larger
    max_moved_bytes: Bytes = 2**30
