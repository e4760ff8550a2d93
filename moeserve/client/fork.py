"""gRPC does not survive some forks: the child has none of its threads, and calls there would wait forever."""

from __future__ import annotations

import os
from typing import Final

from moeserve.errors import MoEServeError


class Forks:
    """Knows whether this process was forked from one with open channels, without gRPC's fork support."""

    def __init__(self) -> None:
        # gRPC reads it when it is imported.
        self._is_survived = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() not in ("0", "false", "no", "f", "n")
        self._has_channels = False
        self._is_broken = False
        os.register_at_fork(after_in_child=self._in_child)

    def opened(self) -> None:
        """A channel was opened."""
        self._has_channels = True

    def check(self) -> None:
        """Raises MoEServeError if a call would hang."""
        if self._is_broken:
            raise MoEServeError(
                "this process was forked after its parent had used a client, with GRPC_ENABLE_FORK_SUPPORT=0 in the environment, and gRPC "
                'cannot go on in it: leave that out, or use clients only after the fork, or start processes by "spawn"'
            )

    def _in_child(self) -> None:
        self._is_broken = self._is_broken or (self._has_channels and not self._is_survived)


FORKS: Final = Forks()
