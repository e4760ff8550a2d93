"""What a host does with experts that do not fit into its memory."""

from __future__ import annotations

from typing import Literal

from moeserve.config.table import Table


class StoreConfig(Table):
    """[store]: where the experts of a host are."""

    #: disk = hosts keep the experts in demand in placement.memory_per_host_bytes, and read others from the checkpoint when rows need them;
    #: unset = all experts are in memory
    spill: Literal["disk"] | None = None
