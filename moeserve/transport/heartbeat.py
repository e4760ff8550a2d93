"""The host's sign of life while it computes: a packet every HEARTBEAT_S, from a thread that does nothing else."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from moeserve.transport.timing import HEARTBEAT_S


class Beating(Protocol):
    """The frontends of one endpoint; to be used from any thread."""

    def owes(self) -> bool:
        """Whether one of them still waits for an answer."""
        ...

    def beat(self) -> None:
        """Tells all of them that this process lives."""
        ...


class HeartbeatThread:
    """Beats at all `sources` while an answer is owed at one of them, and sleeps otherwise.

    All frontends are told, also those that are owed nothing as far as is known: what they have sent may not have been read yet.
    """

    def __init__(self, sources: Sequence[Beating]) -> None:
        self._sources = sources
        self._is_asleep = True
        self._work_came = threading.Event()
        self._stopping = threading.Event()
        #: none until there is work
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is work; costs nothing unless the thread sleeps."""
        if not self._is_asleep:
            return
        self._work_came.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """To be called before the frontends are hung up on by the thread that calls `wake`."""
        self._stopping.set()
        self._work_came.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._work_came.wait()
            self._is_asleep = False
            self._work_came.clear()
            while not self._stopping.wait(HEARTBEAT_S) and self._is_owing():
                for source in self._sources:
                    source.beat()
            if self._stopping.is_set():
                return

    def _is_owing(self) -> bool:
        if not any(source.owes() for source in self._sources):
            self._is_asleep = True
            # Work that came since the question above saw a thread awake, and has not woken it.
            if not any(source.owes() for source in self._sources):
                return False
            self._is_asleep = False
        return True
