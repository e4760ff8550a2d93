"""All hosts of a service as threads of this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from moeserve.cluster.loading import Loading
from moeserve.cluster.thread_host import ThreadHost
from moeserve.cluster.timing import LEAST_REST_S, MOST_REST_S, STOP_TIMEOUT_S, WATCH_S
from moeserve.control.assignments import Assignment
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.host import Holdings, Host, Where, give_way
from moeserve.loops import Notifier, in_thread
from moeserve.observe.stats import HostInfo, PassTime, host_name
from moeserve.release import Release

log = logging.getLogger(__name__)

OnReady = Callable[[HostInfo], None]
Hold = Callable[[int, Where], Holdings]
Loaded = TypeVar("Loaded")


class ThreadFleet:
    """`where` gives the location of host `number` in its incarnation number n; `hold` makes its holdings, still empty."""

    def __init__(self, where: Callable[[int, int], Where], hold: Hold) -> None:
        self._where, self._hold = where, hold
        self._holdings: dict[int, Holdings] = {}
        self._loading = Loading(self._experts_read)
        self._trying: dict[int, asyncio.Task[None]] = {}
        #: in force; one list, so that a host that begins sees what it is then
        self._releases: list[Release] = []
        self.members: dict[int, ThreadHost] = {}
        self._frontends: frozenset[str] = frozenset()
        self._changed = Notifier()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._incarnations = 0
        #: when a host that failed to start may try again, and its latest pause
        self._rests: dict[int, tuple[float, float]] = {}
        #: no host is ever lost for good here
        self.given_up: set[int] = set()
        self._lost: str | None = None

    @property
    def present(self) -> dict[int, HostInfo]:
        """The descriptions of live hosts."""
        return {number: host.info for number, member in self.members.items() if (host := member.running) is not None}

    @property
    def pass_times(self) -> dict[int, PassTime]:
        """How busy each live host has been."""
        return {number: busy for number, member in self.members.items() if (busy := member.pass_time) is not None}

    @property
    def loading(self) -> Mapping[int, int]:
        """Hosts that a change waits for, and how many experts each has read."""
        return self._loading.experts

    @property
    def failing(self) -> dict[int, str]:
        """Hosts that are down and not restarting now, and why."""
        if self._lost is not None:
            return dict.fromkeys(self.members, self._lost)
        return {number: str(member.error) for number, member in self.members.items() if member.error is not None}

    async def take(self, release: Release, assignments: Sequence[Assignment], on_ready: OnReady = lambda _: None) -> None:
        """Each assigned host of `release` loads its new experts, and is started first if needed; `on_ready` is called for each started one.

        Raises ConfigError or CheckpointError; then the caller withdraws the release.
        """
        self._releases.append(release)
        self._rests.clear()  # there is a new release to load
        new = [self._add(each.number) for each in assignments if each.number not in self.members]
        for member in new:
            await self._loading.wait(member.number, partial(self._come_up, member, on_ready))
        for number in {each.number for each in assignments} & {*release.placement.hosts}:
            await self._loading.wait(number, partial(self._have_take, self.members[number], release))

    async def adopt(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """The hosts of `assignments` serve `release`, and earlier ones until `retire`; all others end."""
        self._releases[:] = [release]
        numbers = {each.number for each in assignments}
        await self.remove([number for number in self.members if number not in numbers])
        for number in sorted(numbers):
            member = self.members.get(number) or self._add(number)
            host = await self._until_up(member)
            await in_thread(_load, host.info.num_threads, host.adopt, release)

    async def withdraw(self, epoch: int) -> None:
        """Hosts forget the withdrawn release of `epoch`, and all after it."""
        self._releases[:] = [release for release in self._releases if release.epoch < epoch]
        await self._have_forget(lambda holdings: holdings.withdraw(epoch))

    async def retire(self, epoch: int) -> None:
        """Hosts forget the releases before `epoch`."""
        self._releases[:] = [release for release in self._releases if release.epoch >= epoch]
        await self._have_forget(lambda holdings: holdings.retire(epoch))
        self._introduce()

    async def remove(self, numbers: Sequence[int]) -> None:
        """End these hosts for good, and free what they hold; one that loads ends when it has read the next expert.

        A pass that does not end, as of an expert that waits for something, is left to itself after a while: no thread can be killed.
        """
        leaving = [self.members.pop(number) for number in numbers if number in self.members]
        await asyncio.gather(*map(self._end, leaving))
        self._introduce()

    def admit(self, public_keys: Collection[str]) -> asyncio.Future[None]:
        """Only frontends with these keys may talk to hosts over TCP."""
        self._frontends = frozenset(public_keys)
        self._introduce()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def watch(self, on_change: Callable[[Mapping[int, HostInfo]], None]) -> None:
        """Runs until cancelled: restarts failed hosts, and reports all hosts, up or down, after every change."""
        told: Mapping[int, HostInfo] | None = None
        try:
            while True:
                directory = self._directory()
                if directory != told:
                    on_change(told := directory)
                with suppress(TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await self._changed.wait()
                self._trying = {number: task for number, task in self._trying.items() if not task.done()}
                for number, member in self.members.items():
                    if self._may_try(member):
                        self._trying[number] = asyncio.create_task(self._try(member))
        finally:
            for task in self._trying.values():
                task.cancel()

    def lose(self, why: str) -> None:
        """Starts no more hosts."""
        self._lost = why

    async def stop(self) -> None:
        """End all hosts."""
        await self.remove(list(self.members))

    async def _end(self, member: ThreadHost) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await in_thread(member.stop)
        except TimeoutError:
            log.warning("%s has not finished its pass in %g s: it is left to itself", host_name(member.number), STOP_TIMEOUT_S)
        if (holdings := self._holdings.pop(member.number, None)) is not None:
            await in_thread(holdings.withdraw, 0)

    def _add(self, number: int) -> ThreadHost:
        self._loop = asyncio.get_running_loop()
        self.members[number] = ThreadHost(number, lambda on_crash: self._make(number, on_crash), self._from_any_thread)
        return self.members[number]

    def _make(self, number: int, on_crash: Callable[[], None]) -> Host:
        self._incarnations += 1
        where = self._where(number, self._incarnations)
        # From here on it hears which releases to forget, of those that it begins with.
        holdings = self._holdings[number] = self._hold(number, where)
        if number not in self.members:
            del self._holdings[number]
            raise ExpertUnavailable(f"{host_name(number)} has left")
        _load(where.num_threads, holdings.begin, self._releases)
        return Host(holdings, where, self._frontends, on_crash)

    async def _have_forget(self, forget: Callable[[Holdings], None]) -> None:
        """All hosts, also one that loads: what it has begun with may be no more in force."""
        for holdings in [*self._holdings.values()]:
            await in_thread(forget, holdings)
        for host in self._up():
            host.weigh()

    async def _come_up(self, member: ThreadHost, on_ready: OnReady) -> None:
        on_ready((await self._until_up(member)).info)

    async def _have_take(self, member: ThreadHost, release: Release) -> None:
        host = await self._until_up(member)
        await in_thread(_load, host.info.num_threads, host.take, release)

    async def _experts_read(self, number: int) -> int:
        return self._holdings[number].experts_read if number in self._holdings else 0

    def _from_any_thread(self) -> None:
        assert self._loop is not None, "a fleet that has hosts"
        self._loop.call_soon_threadsafe(self._introduce)

    def _directory(self) -> dict[int, HostInfo]:
        """The latest incarnation of each host; a caller that cannot reach one looks again for the next."""
        hosts = ((number, member, member.running) for number, member in self.members.items())
        known = ((number, member.info if host is None else host.info) for number, member, host in hosts)
        return {number: info for number, info in known if info is not None}

    def _introduce(self) -> None:
        """Every host gets the directory of all hosts, and the keys to accept."""
        directory = self._directory()
        for host in self._up():
            host.meet(directory, self._frontends)
        self._changed.notify()

    def _up(self) -> list[Host]:
        return [host for member in self.members.values() if (host := member.running) is not None]

    async def _until_up(self, member: ThreadHost) -> Host:
        """Waits for a host that was stopped on purpose. Raises the error of its start."""
        while (host := member.running) is None:
            if member.is_stopped:
                await self._changed.wait()
            else:
                await in_thread(member.start)
        return host

    def _may_try(self, member: ThreadHost) -> bool:
        if member.is_up or member.is_stopped or self._lost is not None or member.number in self._trying:
            return False
        return time.monotonic() >= self._rests.get(member.number, (0.0, 0.0))[0]

    async def _try(self, member: ThreadHost) -> None:
        try:
            await in_thread(member.start)
        except MoEServeError as error:
            pause_s = min(max(LEAST_REST_S, 2 * self._rests.get(member.number, (0.0, 0.0))[1]), MOST_REST_S)
            self._rests[member.number] = time.monotonic() + pause_s, pause_s
            log.warning("%s does not start, next attempt in %g s: %s", host_name(member.number), pause_s, error)
        else:
            self._rests.pop(member.number, None)


def _load(num_threads: int, load: Callable[[Loaded], None], what: Loaded) -> None:
    """In a thread of its own, with as many threads as the host will compute with: kernels are chosen for so many."""
    torch.set_num_threads(num_threads)
    give_way()
    load(what)
