"""Where gRPC does not survive a fork: its threads are not in the copy of a process, and calls there would wait for them for ever."""

from __future__ import annotations

import os
from typing import Final

from moeserve.errors import MoEServeError


class Forks:
    """Told when a channel is opened; knows whether this process is the copy of one that had any, and gRPC was not let prepare for that."""

    def __init__(self) -> None:
        # As gRPC reads it, when it is imported.
        self._is_survived = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() not in ("0", "false", "no", "f", "n")
        self._has_channels = False
        self._is_broken = False
        os.register_at_fork(after_in_child=self._in_child)

    def opened(self) -> None:
        """A channel was."""
        self._has_channels = True

    def check(self) -> None:
        """Raises MoEServeError where a call would hang."""
        if self._is_broken:
            raise MoEServeError(
                "this process was forked from one that had used a client, with GRPC_ENABLE_FORK_SUPPORT=0 in the environment, and gRPC "
                'cannot go on in it: leave that out, or use clients only after the fork, or start processes by "spawn"'
            )

    def _in_child(self) -> None:
        self._is_broken = self._is_broken or (self._has_channels and not self._is_survived)


FORKS: Final = Forks()
