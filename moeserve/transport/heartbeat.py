"""The host's heartbeats: while it owes answers, a packet every HEARTBEAT_S, from another thread than the one that computes."""

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
        """Sends a heartbeat to all of them."""
        ...


class HeartbeatThread:
    """Sends heartbeats to the frontends of all `sources` while one of them waits for an answer; sleeps otherwise.

    Every frontend gets them: one that seems to wait for nothing may have sent a message that the busy host has not read yet.
    """

    def __init__(self, sources: Sequence[Beating]) -> None:
        self._sources = sources
        self._is_asleep = True
        self._work_came = threading.Event()
        self._stopping = threading.Event()
        self._beating = threading.Lock()
        #: None until the first work
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """To be called when work has arrived; costs nothing unless the thread sleeps."""
        if not self._is_asleep:
            return
        self._work_came.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def keep_silent(self, until: threading.Event) -> None:
        """Waits for the event; nobody is told anything meanwhile."""
        with self._beating:
            until.wait()

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
                with self._beating:
                    for source in self._sources:
                        source.beat()
            if self._stopping.is_set():
                return

    def _is_owing(self) -> bool:
        if not any(source.owes() for source in self._sources):
            self._is_asleep = True
            # Work that arrived since the check above found the thread awake and did not wake it.
            if not any(source.owes() for source in self._sources):
                return False
            self._is_asleep = False
        return True
