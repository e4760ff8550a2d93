"""How requests are joined, and how their rows reach the hosts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moeserve.config.table import Table
from moeserve.config.values import MAX_SIZE, Size


class BatchingConfig(Table):
    """[batching]: how concurrent requests are joined."""

    max_batch_tokens: Size = 8192
    #: while the hosts are busy, how long a batch that is not full waits for more requests in any case
    max_batch_wait_ms: float = Field(default=0, ge=0, le=MAX_SIZE)
    #: into how many chunks of tokens a large batch is cut, so that hosts compute one while the frontend gathers and adds up others
    micro_batches: Size = 1


class CommunicationConfig(Table):
    """[communication]: how the rows of a batch reach the hosts."""

    #: one message per host, per expert, per node (passed on within the node), or one in all (passed on from host to host)
    pattern: Literal["all_to_all", "point_to_point", "hierarchical", "ring"] = "all_to_all"
