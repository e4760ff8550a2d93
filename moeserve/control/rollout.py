"""Bringing in a new release while requests run: no request fails, and no answer mixes two releases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from moeserve.checkpoints import ReleasedLayer, Swap
from moeserve.control.assignments import Assignment
from moeserve.control.desired import Planner
from moeserve.control.frontends import Frontends
from moeserve.control.stall import unless_stalled
from moeserve.control.state import NumHosts, State
from moeserve.loops import in_thread
from moeserve.observe.stats import host_name
from moeserve.release import Release

log = logging.getLogger(__name__)

T = TypeVar("T")


class Hosts(Protocol):
    """All expert hosts, by number."""

    @property
    def loading(self) -> Mapping[int, int]:
        """Hosts that a `take` waits for, and how many experts each has read so far, as far as that is known."""
        ...

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        """Every host of `release`, started if needed, loads it beside the release it serves. Raises a host's error."""
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
    """

    def __init__(
        self,
        planner: Planner,
        state: State,
        hosts: Hosts,
        frontends: Frontends,
        save: Callable[[State], None],
    ) -> None:
        self.state = state
        self.is_under_way = False
        self._planner = planner
        self._hosts = hosts
        self._frontends = frontends
        self._save = save

    async def swap(self, swaps: Sequence[Swap]) -> Release:
        """New weights in the same places. Raises UnknownLayer, ConfigError or CheckpointError; then nothing has changed."""
        before = self.state
        reading = in_thread(before.release.swapped, swaps, self._planner.layers, before.last_epoch + 1)
        release = await self._unless_stalled(reading, lambda: f"{swaps[0].checkpoint} could not be read")
        await self._bring_in(replace(before, release=release))
        for swap in swaps:
            log.info(
                "epoch %d: layer %s has revision %d, from %s", release.epoch, swap.layer, release.revision(swap.layer), swap.checkpoint
            )
        return release

    async def move(self, assignments: tuple[Assignment, ...], num_hosts: NumHosts) -> Release:
        """The same weights on these hosts; `num_hosts` is the desired number.

        Raises ConfigError, or CheckpointChanged when the weights cannot be read any more; then nothing has changed.
        """
        before = self.state
        if assignments == before.assignments:
            self._remember(replace(before, num_hosts=num_hosts))
            return before.release
        sources = await self._unless_stalled(in_thread(self._readable, before.release), lambda: "files that are served could not be read")
        numbers = [assignment.number for assignment in assignments]
        previous = before.release.placement
        placement = await in_thread(self._planner.moved, assignments, sources, previous, before.last_epoch + 1)
        next_number = max(before.next_number, numbers[-1] + 1)
        release = replace(before.release, placement=placement)
        await self._bring_in(State(release, assignments, num_hosts, release.epoch, next_number))
        gone = {assignment.number for assignment in before.assignments} - set(numbers)
        await self._hosts.remove(sorted(gone))
        log.info("epoch %d: experts are on hosts %s", release.epoch, ", ".join(map(str, numbers)))
        return release

    def _readable(self, release: Release) -> list[ReleasedLayer]:
        """Its layers, after a check that their files have not changed: before any host starts."""
        sources = release.sources(self._planner.layers)
        for source in sources:
            source.check()
        return sources

    async def _bring_in(self, after: State) -> None:
        self.is_under_way = True
        try:
            await self._offer(after)
            await self._frontends.drained()
            await self._hosts.retire(after.release.epoch)
        finally:
            self.is_under_way = False

    async def _offer(self, after: State) -> None:
        before, release = self.state, after.release
        # If this process dies meanwhile, the epoch and the numbers of new hosts are never given out again.
        self._remember(replace(before, last_epoch=release.epoch, next_number=after.next_number))
        try:
            await self._unless_stalled(self._hosts.take(release, after.assignments), self._who_loads)
            self._frontends.set_failing({})  # all of them are up
            await self._frontends.offer(release)
            self._save(replace(after, last_epoch=release.epoch))
            self._frontends.publish(release)
        except BaseException:  # any error: a release that hosts have and frontends do not would be mistaken for the served one
            self._save(self.state)
            self._frontends.withdraw()
            await self._hosts.withdraw(release.epoch)
            await self._hosts.remove(
                sorted({assignment.number for assignment in after.assignments} - {assignment.number for assignment in before.assignments})
            )
            raise
        self.state = replace(after, last_epoch=release.epoch)

    async def _unless_stalled(self, work: Coroutine[Any, Any, T], why: Callable[[], str]) -> T:
        return await unless_stalled(work, lambda: dict(self._hosts.loading), self._planner.placing.load_timeout_s, why)

    def _who_loads(self) -> str:
        return f"{', '.join(map(host_name, sorted(self._hosts.loading)))} could not read one more expert"

    def _remember(self, state: State) -> None:
        if state != self.state:
            self._save(state)
        self.state = state
