"""What every process that answers callers begins with. The hosts do the heavy work."""

from __future__ import annotations

import torch

from moeserve.allocator import give_back_when_quiet, keep_large_blocks
from moeserve.transport import give_back_pools


def prepare() -> None:
    """Its threads and its memory."""
    torch.set_num_threads(1)  # idle threads would spin on the cores of the hosts
    keep_large_blocks()
    give_back_when_quiet(give_back_pools)
