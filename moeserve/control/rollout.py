"""Bringing in a new release while requests run: none fails, and none is answered by a mix of two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from moeserve.checkpoints import LayerSource, ReleasedLayer, Swap
from moeserve.control.assignments import Assignment
from moeserve.control.desired import Planner
from moeserve.control.state import NumHosts, State
from moeserve.release import Release

log = logging.getLogger(__name__)


class Hosts(Protocol):
    """All expert hosts, by number."""

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """Every host of `release`, started on its assignment if need be, can serve it beside what it serves. Raises what a host raised."""
        ...

    async def withdraw(self, epoch: int) -> None:
        """The release of `epoch` will not be, nor any after it."""
        ...

    async def retire(self, epoch: int) -> None:
        """Nobody asks for what was before `epoch` any more."""
        ...

    async def remove(self, numbers: Sequence[int]) -> None:
        """These hosts are not needed any more."""
        ...


class Publisher(Protocol):
    """All frontends."""

    async def welcome(self, release: Release) -> None:
        """Connect to the hosts of `release` that are new."""
        ...

    async def try_out(self, release: Release, sources: Sequence[LayerSource]) -> None:
        """Read what is new in front of the hosts, and have every expert of `release` answer something. Raises what goes wrong."""
        ...

    def publish(self, release: Release) -> None:
        """Batches that begin from now on use `release`, which was tried."""
        ...

    async def drained(self) -> None:
        """Until no batch uses an earlier one."""
        ...

    async def refresh(self) -> None:
        """Learn what hosts hold now."""
        ...

    async def forget(self) -> None:
        """Let go of hosts that the present release has nothing on."""
        ...

    def set_failing(self, failing: Mapping[int, str]) -> None:
        """Of these hosts, while they are down, nobody should wait for any, and why."""
        ...


class Rollout:
    """Make before break: hosts load, frontends switch, running batches end, hosts forget. Its owner makes one change at a time.

    `save` is given the state before it is used: epochs and numbers before they are given out, a release before it is published.
    """

    def __init__(
        self,
        planner: Planner,
        state: State,
        hosts: Hosts,
        frontends: Publisher,
        save: Callable[[State], None],
        drain_timeout_s: float,
    ) -> None:
        self.state = state
        self.is_under_way = False
        self._planner = planner
        self._drain_timeout_s = drain_timeout_s
        self._hosts = hosts
        self._frontends = frontends
        self._save = save

    async def swap(self, swaps: Sequence[Swap]) -> Release:
        """New weights in the same places. Raises UnknownLayer, ConfigError or CheckpointError; then everything is as it was."""
        before = self.state
        release = await asyncio.to_thread(before.release.swapped, swaps, self._planner.layers, before.last_epoch + 1)
        await self._bring_in(replace(before, release=release))
        for swap in swaps:
            log.info(
                "epoch %d: layer %s has revision %d, from %s", release.epoch, swap.layer, release.revision(swap.layer), swap.checkpoint
            )
        return release

    async def move(self, assignments: tuple[Assignment, ...], num_hosts: NumHosts) -> Release:
        """The same weights on these hosts, `num_hosts` being what was asked for.

        Raises ConfigError, or CheckpointChanged when the weights cannot be read any more; then everything is as it was.
        """
        before = self.state
        if assignments == before.assignments:
            self._remember(replace(before, num_hosts=num_hosts))
            return before.release
        sources = await asyncio.to_thread(self._readable, before.release)
        numbers = [assignment.number for assignment in assignments]
        placement = self._planner.plan(len(assignments), sources).renumbered(numbers, before.last_epoch + 1)
        next_number = max(before.next_number, numbers[-1] + 1)
        release = replace(before.release, placement=placement)
        await self._bring_in(State(release, assignments, num_hosts, release.epoch, next_number))
        gone = {assignment.number for assignment in before.assignments} - set(numbers)
        await self._hosts.remove(sorted(gone))
        log.info("epoch %d: experts stand on hosts %s", release.epoch, ", ".join(map(str, numbers)))
        return release

    def _readable(self, release: Release) -> list[ReleasedLayer]:
        """Its layers, all of which are as they were: that is found out before any host starts."""
        sources = release.sources(self._planner.layers)
        for source in sources:
            source.check()
        return sources

    async def _bring_in(self, after: State) -> None:
        self.is_under_way = True
        try:
            await self._offer(after)
            await self._let_go()
            await self._hosts.retire(after.release.epoch)
            await self._frontends.refresh()
        finally:
            self.is_under_way = False

    async def _offer(self, after: State) -> None:
        before, release = self.state, after.release
        # Should this process die on the way, neither the epoch nor the numbers of new hosts are ever given out again.
        self._remember(replace(before, last_epoch=release.epoch, next_number=after.next_number))
        try:
            sources = await asyncio.to_thread(release.sources, self._planner.layers)
            await self._hosts.take(release, after.assignments)
            self._frontends.set_failing({})  # all of them are up, perhaps since a moment ago
            await self._frontends.welcome(release)
            await self._frontends.try_out(release, sources)
            self._save(replace(after, last_epoch=release.epoch))
            self._frontends.publish(release)
        except BaseException:  # whatever it was: a release that hosts have and frontends do not would be mistaken for what is served
            self._save(self.state)
            await self._frontends.forget()
            await self._hosts.withdraw(release.epoch)
            await self._hosts.remove(
                sorted({assignment.number for assignment in after.assignments} - {assignment.number for assignment in before.assignments})
            )
            raise
        self.state = replace(after, last_epoch=release.epoch)

    def _remember(self, state: State) -> None:
        if state != self.state:
            self._save(state)
        self.state = state

    async def _let_go(self) -> None:
        """Batches end as they began; those that wait too long for a host that leaves, because it hangs, begin again with the others."""
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self._frontends.drained()
        except TimeoutError:
            log.warning("epoch %d: batches still wait for hosts that leave; they begin again on the others", self.state.release.epoch)
        await self._frontends.forget()
        await self._frontends.drained()
