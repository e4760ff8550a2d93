"""The host's end: one blocking wait for all frontends, over any transport."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from moeserve.transport.heartbeat import Beating, HeartbeatThread
from moeserve.transport.loads import Loads
from moeserve.transport.wire import Kind, pack_note
from moeserve.transport.work import Work

OnEvents = Callable[[int], object]


class Poller:
    """Calls `on_events(event mask)` of every file descriptor that is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._on_events: dict[int, OnEvents] = {}

    def add(self, fd: int, on_events: OnEvents) -> None:
        """Watches `fd` for readability."""
        self._on_events[fd] = on_events
        self._epoll.register(fd, select.EPOLLIN)

    def watch_writable(self, fd: int, wanted: bool) -> None:
        """Turns watching `fd` for writability on or off."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def remove(self, fd: int) -> None:
        """Call it before closing `fd`."""
        del self._on_events[fd]
        self._epoll.unregister(fd)

    def wait(self, timeout_s: float) -> None:
        """Waits for events, up to a timeout, and calls their callbacks."""
        for fd, mask in self._epoll.poll(timeout_s):
            # An earlier callback of this round may have removed it.
            if fd in self._on_events:
                self._on_events[fd](mask)

    def close(self) -> None:
        """Ends the watching; file descriptors stay open."""
        self._epoll.close()


class Source(Beating, Protocol):
    """One endpoint: accepts frontends and turns their messages into `Work`."""

    endpoint: str

    def catch_up(self) -> None:
        """Takes in what arrived without leaving its file descriptor readable."""

    def tell(self, packet: bytes) -> None:
        """Sends a note to all frontends that have room for it."""
        ...

    def close(self) -> None:
        """Stops listening and closes all connections."""
        ...


class Listener:
    """All endpoints of one host. Everything but `wake` belongs to one thread at a time."""

    def __init__(self, poller: Poller, sources: Sequence[Source], arrived: list[Work]) -> None:
        self.endpoints = tuple(source.endpoint for source in sources)
        self._poller = poller
        self._sources = sources
        self._arrived = arrived
        self._heartbeat = HeartbeatThread(sources)
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._held_until = threading.Event()
        self._held_until.set()
        poller.add(self._wake_fd, lambda _: self._woken())

    def poll(self, timeout_s: float) -> list[Work]:
        """All work that has arrived from all frontends; waits up to `timeout_s` for the first. May be empty before that.

        Work that was cancelled or whose deadline has passed is answered here and not returned.
        """
        for source in self._sources:
            source.catch_up()
        self._poller.wait(0 if self._arrived else timeout_s)
        arrived = self._arrived.copy()
        self._arrived.clear()
        if arrived:
            self._heartbeat.wake()
        return [work for work in arrived if not work.drop_if_late()]

    def wake(self) -> None:
        """Makes the running or next `poll` return; from any thread, also after `close`."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def tell(self, loads: Loads) -> None:
        """Lets all frontends know: that experts were read, so a pass makes progress."""
        for source in self._sources:
            source.tell(pack_note(Kind.LOADS, value=loads.packed()))

    def hold(self, until: threading.Event) -> None:
        """From any thread: after the pass that is running nothing is read, answered or said until the event is set.

        To frontends of this node this is a process that was stopped, for fault injection; over TCP a thread of libzmq still answers pings.
        """
        self._held_until = until
        self.wake()

    def close(self) -> None:
        """Disconnects all frontends and leaves nothing behind; unanswered work fails there. Idempotent."""
        with self._wake_lock:
            if self._wake_fd < 0:
                return
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._heartbeat.stop()
        for source in self._sources:
            source.close()
        self._poller.close()

    def _woken(self) -> None:
        os.eventfd_read(self._wake_fd)
        if not self._held_until.is_set():
            self._heartbeat.keep_silent(self._held_until)
