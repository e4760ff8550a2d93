"""All frontends of a service as one: any number that follow, from this process or from elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace

from moeserve.config import FrontendConfig
from moeserve.control import timing
from moeserve.control.follow import Order, Report, Setup, followed_config
from moeserve.errors import ConfigError
from moeserve.loops import Notifier
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.transport import KeyPair

log = logging.getLogger(__name__)

#: the public keys that hosts shall let in, from now on
OnKeys = Callable[[frozenset[str]], Awaitable[None]]


class FollowingFrontend:
    """A frontend that follows, for as long as its stream lasts."""

    def __init__(self, report: Report, keys: KeyPair | None) -> None:
        self.report = report
        self.keys = keys
        self.public_key = report.public_key if keys is None else keys.public
        #: the epoch it was told of first: until it says more, it may be using that
        self.told_epoch = 0
        self.is_dismissed = False

    @property
    def oldest_epoch(self) -> int:
        """No batch of it uses an earlier one; 0 = it has not been told of any."""
        return self.report.oldest_epoch or self.told_epoch


class Frontends:
    """What a roll-out talks to. Those that follow are counted from when they serve until they leave, or say nothing for too long.

    `service_id` is of this deployment; batches have `drain_timeout_s` to end on hosts that leave. `on_keys` is told whom hosts shall let in
    whenever that changes. `keys` are of frontends that followed an earlier controller: they stay valid for an hour, within which those
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
        #: keys of those that left without a word, and until when they stay valid
        self._absent = dict.fromkeys(keys, time.monotonic() + timing.KEEP_KEY_S)
        self._heard, self._changed = Notifier(), Notifier()
        self._admitting = asyncio.Lock()

    def members(self) -> list[Report]:
        """What those say of themselves that follow now."""
        return [member.report for member in self._members]

    def begin(self, release: Release) -> None:
        """The first release: what is served already, or will be once its hosts are there."""
        self._tell(replace(self._order, current=release))

    async def until_back(self, timeout_s: float) -> None:
        """Until those that followed an earlier controller do again; some may be gone. A change before that would pass them by."""
        await self._heard.until(lambda: not self._absent, time.monotonic() + timeout_s)

    def directory(self, hosts: Mapping[int, HostInfo]) -> None:
        """The present incarnations of all hosts."""
        if dict(hosts) != dict(self._order.hosts):
            self._tell(replace(self._order, hosts=dict(hosts)))

    async def join(self, report: Report) -> FollowingFrontend:
        """A frontend follows from now on; hosts let it in when this returns. It may have followed before: then it brings its key."""
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
        """What a member says now."""
        member.report = report
        self._heard.notify()

    def leave(self, member: FollowingFrontend) -> None:
        """Its stream broke: it is not counted, but may serve on and come back."""
        if member in self._members:
            self._members.remove(member)
            self._absent[member.public_key] = time.monotonic() + timing.KEEP_KEY_S
            log.info("frontend %s does not follow any more", member.report.name)
        self._heard.notify()

    async def left(self, member: FollowingFrontend) -> None:
        """It has left for good: hosts let it in no longer."""
        self._dismiss(member)
        self._absent.pop(member.public_key, None)
        await self._admit()

    async def orders(self, member: FollowingFrontend) -> AsyncIterator[Order]:
        """What the member shall do, at once and whenever that changes; changes it is too slow for are one. Ends when it is dismissed."""
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
        """Until each has reached every host of `release` and had an answer of every expert. Raises ConfigError when one cannot use it."""
        self._tell(replace(self._order, candidate=release))
        await self._tried(release.epoch)

    async def _tried(self, epoch: int) -> None:
        def missing() -> list[FollowingFrontend]:
            return [member for member in self._members if member.report.epoch and member.report.tried_epoch != epoch]

        def refusing() -> list[Report]:
            said = (member.report for member in self._members)
            return [report for report in said if report.tried_epoch == epoch and report.refusal]

        deadline = time.monotonic() + self._try_timeout_s
        await self._heard.until(lambda: refusing() or not missing(), deadline)
        for report in refusing():
            raise ConfigError(f"frontend {report.name} cannot use epoch {epoch}: {report.refusal}")
        for member in missing():
            log.warning("frontend %s did not try epoch %d within %g s: it is hung up on", member.report.name, epoch, self._try_timeout_s)
            self._dismiss(member)

    def publish(self, release: Release) -> None:
        """Batches that begin use `release`, which was offered, as soon as their frontend hears of it."""
        self._let_go_at = time.monotonic() + self._drain_timeout_s + timing.GRACE_S
        self._tell(replace(self._order, current=release, candidate=None))

    async def drained(self) -> None:
        """Until no batch anywhere uses an earlier release; a frontend that takes too long is waited for no longer."""
        epoch = 0 if self._order.current is None else self._order.current.epoch

        def behind() -> list[FollowingFrontend]:
            return [member for member in self._members if 0 < member.oldest_epoch < epoch]

        await self._heard.until(lambda: not behind(), self._let_go_at)
        for member in behind():
            log.warning("frontend %s still uses epoch %d, and is waited for no longer", member.report.name, member.oldest_epoch)

    def withdraw(self) -> None:
        """There is no candidate any more."""
        if self._order.candidate is not None:
            self._tell(replace(self._order, candidate=None))

    def set_failing(self, failing: Mapping[int, str]) -> None:
        """Of these hosts, while they are down, nobody should wait for any, and why; the others are on their way."""
        if dict(failing) != dict(self._order.failing):
            self._tell(replace(self._order, failing=dict(failing)))

    def _tell(self, order: Order) -> None:
        self._order = order
        self._changed.notify()

    def _dismiss(self, member: FollowingFrontend) -> None:
        member.is_dismissed = True
        self.leave(member)
        self._changed.notify()

    async def _admit(self) -> None:
        async with self._admitting:  # or an earlier set might arrive last
            now = time.monotonic()
            self._absent = {key: until for key, until in self._absent.items() if until > now}
            await self._on_keys(frozenset({*self._absent, *(member.public_key for member in self._members)}))
