"""gRPC does not survive some forks: the child has none of its threads, and calls there would wait forever."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Final, Protocol

from moeserve.errors import MoEServeError

#: of the thread in which asyncio's gRPC waits, as long as there is a channel or a server of it, be it another library's
_POLLER: Final = "(_poll_wrapper)"


class Heir(Protocol):
    """What a forked process begins anew."""

    def in_child(self) -> None:
        """Runs in the new process, before anything else does."""


class Forks:
    """Knows whether this process was forked from one with open channels, without gRPC's fork support, which asyncio's never have."""

    def __init__(self) -> None:
        # gRPC reads it when it is imported.
        self._is_survived = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() not in ("0", "false", "no", "f", "n")
        self._has_channels = False
        self._of_asyncio: weakref.WeakSet[Any] = weakref.WeakSet()
        self._heirs: weakref.WeakSet[Heir] = weakref.WeakSet()
        self._is_broken = self._is_asyncio_broken = self._has_poller = False
        os.register_at_fork(before=self._in_parent, after_in_child=self._in_child)

    def register(self, heir: Heir) -> None:
        """Has `heir` begin anew in every process that is forked from this one."""
        self._heirs.add(heir)

    def opened(self, channel: Any, is_async: bool) -> None:
        """A channel was opened; is_async: one of asyncio."""
        self._has_channels = True
        if is_async:
            self._of_asyncio.add(channel)

    def check(self, is_async: bool) -> None:
        """Raises MoEServeError if a call would hang; is_async: one of asyncio."""
        if self._is_broken:
            raise MoEServeError(
                "this process was forked after its parent had used a client, with GRPC_ENABLE_FORK_SUPPORT=0 in the environment, and gRPC "
                'cannot go on in it: leave that out, or use clients only after the fork, or start processes by "spawn"'
            )

        if is_async and self._is_asyncio_broken:
            raise MoEServeError(
                "this process was forked while its parent had an AsyncClient, calls of submit, an EmbeddedClient or a service, and "
                "asyncio's gRPC cannot go on in it: call Client.forward, or begin these only after the fork, or start processes by "
                '"spawn"'
            )

    def _in_parent(self) -> None:
        self._has_poller = any(thread.name.endswith(_POLLER) for thread in threading.enumerate())

    def _in_child(self) -> None:
        self._is_broken = self._is_broken or (self._has_channels and not self._is_survived)
        self._is_asyncio_broken = self._is_asyncio_broken or self._has_poller or bool(self._of_asyncio)
        if not self._is_broken:
            for heir in self._heirs:
                heir.in_child()


FORKS: Final = Forks()
