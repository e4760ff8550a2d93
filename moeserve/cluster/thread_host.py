"""An expert host in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.host import Host
from moeserve.observe.stats import HostInfo, PassTime, host_name

#: makes a host that loads the releases in force and listens; its argument is called if the host's thread fails
Make = Callable[[Callable[[], None]], Host]


class ThreadHost:
    """Host `number`: `start` after its end brings up a new incarnation, as a new process would be. All methods are thread-safe.

    `on_change` is called when it goes up or down.
    """

    def __init__(self, number: int, make: Make, on_change: Callable[[], None]) -> None:
        self.number = number
        #: the description of the latest incarnation, up or down; None before the first
        self.info: HostInfo | None = None
        #: why the latest attempt to start it failed
        self.error: MoEServeError | None = None
        #: it was stopped on purpose
        self.is_stopped = False
        self._make, self._on_change = make, on_change
        self._starting, self._changing = threading.Lock(), threading.Lock()
        self._host: Host | None = None
        self._stops = 0

    @property
    def running(self) -> Host | None:
        """The running host, None while it is down. It may end in another thread at any time: ask once, and use what you got."""
        return self._host

    @property
    def is_up(self) -> bool:
        """Whether it answers."""
        return self._host is not None

    @property
    def host(self) -> Host:
        """The running host, where nothing ends it meanwhile."""
        host = self._host
        assert host is not None, "a host that is up"
        return host

    @property
    def pass_time(self) -> PassTime | None:
        """How busy it has been; None while it is down."""
        host = self._host
        return None if host is None else host.pass_time

    def start(self) -> None:
        """Load and listen, unless it is up. Raises a MoEServeError, which is its `error` then.

        One that is stopped while it loads ends as soon as it has loaded. To be called in a thread that does nothing else, which gets
        the priority of a host.
        """
        with self._starting:
            with self._changing:
                if self._host is not None:
                    return
                self.is_stopped, stops = False, self._stops
            try:
                self._enter(self._make(self._crashed), stops)
            except MoEServeError as error:
                self.error = error
                raise
            except Exception as error:  # any error, as of too little memory
                why = f"{host_name(self.number)} cannot load its experts: {type(error).__name__}: {error}"
                self.error = ExpertUnavailable(why)
                raise self.error from error
            finally:
                self._on_change()

    def stop(self) -> None:
        """Finish the running pass; it is down until `start`."""
        with self._changing:
            self.is_stopped = True
            self._stops += 1
            host, self._host = self._host, None
        self._end(host)

    def kill(self) -> None:
        """End it as if its process were killed, but for the running pass: what waits is lost, and its fleet starts it again."""
        with self._changing:
            host, self._host = self._host, None
        self._end(host)

    def _end(self, host: Host | None) -> None:
        if host is not None:
            host.stop()
            self._on_change()

    def _enter(self, host: Host, stops: int) -> None:
        """Unless it was stopped meanwhile."""
        with self._changing:
            if host.has_failed:  # before anybody knew of it
                raise ExpertUnavailable(f"{host_name(self.number)} has failed as it started")
            if self._stops == stops:
                self._host, self.error = host, None
                host.weigh()  # releases may have been forgotten while it was not known to be up
                self.info = host.info
                return
        host.stop()

    def _crashed(self) -> None:
        """In the thread of an incarnation that has failed, perhaps while it ended; the next one may be up by then."""
        with self._changing:
            if self._host is not None and self._host.has_failed:
                self._host = None
        self._on_change()
