"""Bringing in a new release while requests run: no request fails, and no answer mixes two releases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from moeserve.control.assignments import Assignment
from moeserve.control.changes import told
from moeserve.control.frontends import Frontends
from moeserve.control.stall import unless_stalled
from moeserve.control.state import State
from moeserve.observe.stats import host_name
from moeserve.release import Release

log = logging.getLogger(__name__)


class Hosts(Protocol):
    """All expert hosts, by number."""

    @property
    def loading(self) -> Mapping[int, int]:
        """Hosts that a `take` waits for, and how many experts each has read so far, as far as that is known."""
        ...

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """Every host of `release` that is assigned, started if needed, loads it beside the one it serves. Raises a host's error."""
        ...

    async def withdraw(self, epoch: int) -> None:
        """Forget the release of `epoch` and all after it."""
        ...

    async def retire(self, epoch: int) -> None:
        """Forget all releases before `epoch`."""
        ...

    async def remove(self, numbers: Sequence[int]) -> None:
        """End these hosts."""
        ...


class Rollout:
    """Make before break: hosts load, frontends switch, running batches end, hosts forget. Its owner makes one change at a time.

    `save` receives the state before it is used: epochs and numbers before they are given out, a release before it is published.
    A change of which hosts read nothing more for `load_timeout_s` is withdrawn.
    """

    def __init__(self, state: State, hosts: Hosts, frontends: Frontends, save: Callable[[State], None], load_timeout_s: float) -> None:
        self.state = state
        #: what is being brought in, as frontends are told; "" = nothing
        self.changing = ""
        self._hosts = hosts
        self._frontends = frontends
        self._save = save
        self._load_timeout_s = load_timeout_s

    async def bring_in(self, after: State, what: str, gone: Collection[int] = ()) -> Release:
        """The state `after`, which was made of the present one. Raises the error of a host or a frontend; then nothing has changed.

        `what`: for people, who see it meanwhile. `gone`: hosts that do not come back, and only lose experts by it, as all do: it cannot be
        tried then, and need not be.
        """
        before = self.state
        if after.release is before.release:
            self._remember(after)
            return after.release
        self.changing = what
        try:
            self._frontends.set_balancing(changing=what)
            await self._offer(after, gone)
            await self._frontends.drained()
            await self._hosts.retire(after.release.epoch)
        finally:
            self.changing = ""
        await self._hosts.remove(_more(before, after))
        for sentence in told(before, after):
            log.info("%s", sentence)
        return after.release

    async def _offer(self, after: State, gone: Collection[int]) -> None:
        before, release = self.state, after.release
        # If this process dies meanwhile, the epoch and the numbers of new hosts are never given out again.
        self._remember(replace(before, last_epoch=release.epoch, next_number=after.next_number))
        try:
            taking = self._hosts.take(release, [each for each in after.assignments if each.number not in gone])
            await unless_stalled(taking, lambda: dict(self._hosts.loading), self._load_timeout_s, self._who_loads)
            if not gone:
                self._frontends.set_failing({})  # all of them are up
                await self._frontends.offer(release)
            self._save(replace(after, last_epoch=release.epoch))
            self._frontends.publish(release)
        except BaseException:  # any error: a release that hosts have and frontends do not would be mistaken for the served one
            self._frontends.withdraw()
            try:
                self._save(self.state)
            finally:
                await self._hosts.withdraw(release.epoch)
                await self._hosts.remove(_more(after, before))
            raise
        self.state = replace(after, last_epoch=release.epoch)

    def _who_loads(self) -> str:
        return f"{', '.join(map(host_name, sorted(self._hosts.loading)))} could not read one more expert"

    def _remember(self, state: State) -> None:
        if state != self.state:
            self._save(state)
        self.state = state


def _more(some: State, others: State) -> list[int]:
    """The hosts of `some` that `others` does not have."""
    return sorted({assignment.number for assignment in some.assignments} - {assignment.number for assignment in others.assignments})
