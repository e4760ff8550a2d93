"""An expert host in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from moeserve.errors import MoEServeError
from moeserve.host import Host
from moeserve.observe.stats import HostInfo

#: makes a host that loads what is in force and listens; is given what to call when its thread has failed
Make = Callable[[Callable[[], None]], Host]


class ThreadHost:
    """Host `number`: `start` after its end brings up a new incarnation, as a new process would be. All may be called from any thread.

    `on_change` is called whenever it is up, or is not any more.
    """

    def __init__(self, number: int, make: Make, on_change: Callable[[], None]) -> None:
        self.number = number
        #: of the latest incarnation, up or not; None before there was one
        self.info: HostInfo | None = None
        #: why the latest try to start it failed
        self.error: MoEServeError | None = None
        #: it is down because somebody has stopped it
        self.is_stopped = False
        self._make, self._on_change = make, on_change
        self._changing = threading.Lock()
        self._host: Host | None = None

    @property
    def is_up(self) -> bool:
        """It answers."""
        return self._host is not None

    @property
    def host(self) -> Host:
        """The one that is up."""
        assert self._host is not None, "a host that is up"
        return self._host

    def start(self) -> None:
        """Load and listen, unless it is up. Raises ConfigError or CheckpointError, which is its `error` then."""
        with self._changing:
            if self._host is not None:
                return
            self.is_stopped = False
            try:
                self._host, self.error = self._make(self._crashed), None
                self.info = self._host.info
            except MoEServeError as error:
                self.error = error
                raise
            finally:
                self._on_change()

    def stop(self) -> None:
        """Finish the pass that is running; it is down until somebody starts it."""
        with self._changing:
            self.is_stopped = True
            if self._host is not None:
                self._host.stop()
                self._host = None
                self._on_change()

    def _crashed(self) -> None:
        self._host = None
        self._on_change()
