"""All frontends of a service that follow the controller, in this process or in others."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from moeserve.config import FrontendConfig
from moeserve.control import timing
from moeserve.control.follow import Order, Report, Setup, followed_config
from moeserve.errors import ConfigError
from moeserve.loops import Notifier
from moeserve.observe.balancing import Balancing
from moeserve.observe.counted import Counted
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.transport import KeyPair

log = logging.getLogger(__name__)

#: receives the public keys that hosts should accept from now on
OnKeys = Callable[[frozenset[str]], Awaitable[None]]


class FollowingFrontend:
    """A following frontend, while its stream lasts."""

    def __init__(self, report: Report, keys: KeyPair | None) -> None:
        self.report = report
        self.keys = keys
        self.public_key = report.public_key if keys is None else keys.public
        #: the epoch of its first order: it may use that before it reports
        self.told_epoch = 0
        self.is_dismissed = False

    @property
    def oldest_epoch(self) -> int:
        """The earliest epoch that its batches may use; 0 = it has no order yet."""
        return self.report.oldest_epoch or self.told_epoch


class Frontends:
    """The frontends as a roll-out sees them. A frontend counts from the time it serves until it leaves, or is silent for too long.

    `service_id` names this deployment; batches have `drain_timeout_s` to end on hosts that leave. `on_keys` receives the keys that hosts
    should accept, whenever they change. `keys` of frontends of an earlier controller stay valid for an hour, because these
    come back.
    """

    def __init__(
        self, service_id: str, config: FrontendConfig, drain_timeout_s: float, on_keys: OnKeys, keys: Collection[str] = ()
    ) -> None:
        self._service_id = service_id
        self._config_json = followed_config(config)
        self._drain_timeout_s = drain_timeout_s
        self._try_timeout_s = 2 * config.resilience.request_timeout_s + timing.GRACE_S
        self._on_keys = on_keys
        self._members: list[FollowingFrontend] = []
        self._order = Order()
        self._let_go_at = 0.0
        self._busy_told_at = -math.inf
        #: keys of frontends whose stream broke, and until when they stay valid
        self._absent = dict.fromkeys(keys, time.monotonic() + timing.KEEP_KEY_S)
        #: takes what frontends say that they have counted, by their keys
        self.on_counted: Callable[[str, Counted], None] = lambda key, counted: None
        self._heard, self._changed = Notifier(), Notifier()
        self._admitting = asyncio.Lock()
        #: the keys that hosts have been told of last; None = not yet, or not all of them
        self._admitted: frozenset[str] | None = None

    def members(self) -> list[Report]:
        """The reports of the frontends that follow now."""
        return [member.report for member in self._members]

    def keys(self) -> frozenset[str]:
        """The keys of those that follow now, or may come back."""
        return frozenset({*self._absent, *(member.public_key for member in self._members)})

    def begin(self, release: Release) -> None:
        """The first release: already served, or served when its hosts are ready."""
        self._tell(replace(self._order, current=release))

    async def until_back(self, timeout_s: float) -> None:
        """Waits for frontends of an earlier controller; some may be gone. A change before that would miss them.

        They may use an earlier release: their batches have as long to end as after `publish`.
        """
        await self._heard.until(lambda: not self._absent, time.monotonic() + timeout_s)
        self._let_go()

    def directory(self, hosts: Mapping[int, HostInfo]) -> None:
        """Sets the current incarnations of all hosts."""
        if dict(hosts) != dict(self._order.hosts):
            self._tell(replace(self._order, hosts=dict(hosts)))

    async def join(self, report: Report) -> FollowingFrontend:
        """A frontend follows from now on; hosts accept it when this returns. If it has followed before, it brings its key."""
        member = FollowingFrontend(report, None if report.public_key else KeyPair.generate())
        for same in [other for other in self._members if other.public_key == member.public_key]:
            self._dismiss(same)
        self._members.append(member)
        self._absent.pop(member.public_key, None)
        log.info("frontend %s follows", report.name)
        self._heard.notify()
        try:
            await self._admit()
        except BaseException:
            self.leave(member)
            raise
        return member

    def hear(self, member: FollowingFrontend, report: Report) -> None:
        """Takes a report of a member."""
        if report.counted is not None:
            self.on_counted(member.public_key, report.counted)
        member.report = report
        self._heard.notify()

    def leave(self, member: FollowingFrontend) -> None:
        """Its stream broke: it does not count, but may keep serving and come back."""
        if member in self._members:
            self._members.remove(member)
            self._absent[member.public_key] = time.monotonic() + timing.KEEP_KEY_S
            log.info("frontend %s does not follow any more", member.report.name)
        self._heard.notify()

    async def left(self, member: FollowingFrontend) -> None:
        """It has left for good: hosts stop accepting it."""
        self._dismiss(member)
        self._absent.pop(member.public_key, None)
        await self._admit()

    async def orders(self, member: FollowingFrontend) -> AsyncIterator[Order]:
        """Orders for the member, at once and after every change; a slow member gets only the latest. Ends when it is dismissed."""
        told: Order | None = None
        setup: Setup | None = Setup(self._service_id, self._config_json, member.keys, self._drain_timeout_s)
        while not member.is_dismissed:
            if told is self._order:
                await self._changed.wait()
                continue
            told = self._order
            member.told_epoch = member.told_epoch or (0 if told.current is None else told.current.epoch)
            yield told if setup is None else replace(told, setup=setup)
            setup = None

    async def offer(self, release: Release) -> None:
        """Every frontend tries `release`: it reaches every host and gets an answer from every expert. Raises ConfigError if one cannot.

        One that does not serve yet is waited for only while none does, so that a change right after the start is tried, too.
        """
        self._tell(replace(self._order, candidate=release))
        await self._tried(release.epoch)

    async def _tried(self, epoch: int) -> None:
        def missing() -> list[FollowingFrontend]:
            serving = [member for member in self._members if member.report.epoch]
            return [member for member in serving or self._members if member.report.tried_epoch != epoch]

        def refusing() -> list[Report]:
            said = (member.report for member in self._members)
            return [report for report in said if report.tried_epoch == epoch and report.refusal]

        deadline = time.monotonic() + self._try_timeout_s
        await self._heard.until(lambda: refusing() or not missing(), deadline)
        for report in refusing():
            raise ConfigError(f"frontend {report.name} cannot use epoch {epoch}: {report.refusal}")
        for member in missing():
            log.warning("frontend %s did not try epoch %d within %g s: closing its stream", member.report.name, epoch, self._try_timeout_s)
            self._dismiss(member)

    def publish(self, release: Release) -> None:
        """New batches use `release`, which was offered, as soon as their frontend has the order."""
        self._let_go()
        self._tell(replace(self._order, current=release, candidate=None, balancing=replace(self.balancing, changing="")))

    async def drained(self) -> None:
        """Returns when no batch uses an earlier release, or a frontend takes too long."""
        epoch = 0 if self._order.current is None else self._order.current.epoch

        def behind() -> list[FollowingFrontend]:
            return [member for member in self._members if 0 < member.oldest_epoch < epoch]

        await self._heard.until(lambda: not behind(), self._let_go_at)
        for member in behind():
            log.warning("frontend %s still uses epoch %d; not waiting for it any longer", member.report.name, member.oldest_epoch)

    def withdraw(self) -> None:
        """Removes the candidate: nothing changes any more."""
        self._tell(replace(self._order, candidate=None, balancing=replace(self.balancing, changing="")))

    def set_failing(self, failing: Mapping[int, str]) -> None:
        """Sets the hosts that are down and not restarting, and why."""
        if dict(failing) != dict(self._order.failing):
            self._tell(replace(self._order, failing=dict(failing)))

    def set_wanted(self, hosts: int, missing: int) -> None:
        """Sets how many hosts should run, and how many of them have no room on the nodes."""
        if (hosts, missing) != (self._order.wanted_hosts, self._order.missing_hosts):
            self._tell(replace(self._order, wanted_hosts=hosts, missing_hosts=missing))

    @property
    def balancing(self) -> Balancing:
        """What they have been told of balancing."""
        return self._order.balancing

    def set_balancing(self, **changes: Any) -> None:
        """Tells them what the controller has done to balance the hosts, or is doing: fields of `Balancing`."""
        self._tell(replace(self._order, balancing=replace(self._order.balancing, **changes)))

    def set_busy(self, shares: Mapping[int, float], now: float) -> None:
        """The share of its time that each host has lately spent in passes; to be called often, as it is told now and then."""
        busy = {number: round(share, 2) for number, share in shares.items()}
        if busy != dict(self._order.busy) and now >= self._busy_told_at + timing.TELL_BUSY_S:
            self._busy_told_at = now
            self._tell(replace(self._order, busy=busy))

    def _let_go(self) -> None:
        self._let_go_at = time.monotonic() + self._drain_timeout_s + timing.GRACE_S

    def _tell(self, order: Order) -> None:
        self._order = order
        self._changed.notify()

    def _dismiss(self, member: FollowingFrontend) -> None:
        member.is_dismissed = True
        self.leave(member)
        self._changed.notify()

    async def _admit(self) -> None:
        async with self._admitting:  # otherwise an earlier set might arrive last
            now = time.monotonic()
            self._absent = {key: until for key, until in self._absent.items() if until > now}
            keys = self.keys()
            if keys != self._admitted:  # who waited here has been let in with others: where a host hangs, telling it takes seconds
                self._admitted = None
                await self._on_keys(keys)
                self._admitted = keys
