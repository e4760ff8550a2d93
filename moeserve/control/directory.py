"""The addresses of hosts, as a controller announces them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from moeserve.control import timing
from moeserve.loops import Notifier
from moeserve.observe.stats import HostInfo


class Directory:
    """The current incarnations of all hosts, by number."""

    def __init__(self) -> None:
        self._hosts: dict[int, HostInfo] = {}
        self._given: dict[int, tuple[HostInfo, float]] = {}
        self._changed = Notifier()

    def replace(self, hosts: Mapping[int, HostInfo]) -> None:
        """Replaces all entries."""
        self._hosts = dict(hosts)
        self._changed.notify()

    @property
    def hosts(self) -> Mapping[int, HostInfo]:
        """What is announced now, for who does not want to reach one."""
        return self._hosts

    async def find(self, number: int) -> HostInfo:
        """The current incarnation of a host, when one is announced.

        A caller that asks again within seconds could not reach it, so it waits a little for another incarnation.
        """
        given, asked_at = self._given.get(number, (None, 0.0))
        await self._changed.until(lambda: number in self._hosts and self._hosts[number] != given, asked_at + timing.PATIENCE_S)
        await self._changed.until(lambda: number in self._hosts)
        info = self._hosts[number]
        self._given[number] = info, time.monotonic()
        return info
