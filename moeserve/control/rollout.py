"""Bringing in a new release while requests run: none fails, and none is answered by a mix of two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from moeserve.checkpoints import LayerSource, Swap, check_memory, host_bytes, memory_bytes
from moeserve.config import ServiceConfig
from moeserve.control.reconcile import reconcile
from moeserve.control.seats import Node, Seat
from moeserve.control.wish import wanted_hosts
from moeserve.errors import ConfigError
from moeserve.placement import plan_placement
from moeserve.release import Release

log = logging.getLogger(__name__)

FindNodes = Callable[[], Awaitable[Sequence[Node]]]


class Hosts(Protocol):
    """All expert hosts, by number."""

    async def take(self, release: Release, seats: Sequence[Seat]) -> None:
        """Every host of `release`, started on its seat if need be, can serve it beside what it serves. Raises what a host raised."""
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
        """Have every expert of `release` answer something. Raises what goes wrong."""
        ...

    def publish(self, release: Release, sources: Sequence[LayerSource]) -> None:
        """Batches that begin from now on use `release`."""
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


class Rollout:
    """Make before break: hosts load, frontends switch, running batches end, hosts forget. One change at a time."""

    def __init__(
        self, config: ServiceConfig, release: Release, seats: Sequence[Seat], hosts: Hosts, frontend: Publisher, nodes: FindNodes
    ) -> None:
        self.release = release
        self.seats = tuple(seats)
        self._config = config
        self._nodes = nodes
        self._hosts = hosts
        self._frontend = frontend
        self._epoch = release.epoch
        self._next_number = max(release.placement.hosts) + 1
        self._one_at_a_time = asyncio.Lock()
        self._changes: set[asyncio.Task[Release]] = set()

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None = None) -> Release:
        """Serve a layer, or some of its experts, with the weights of another folder of the same model.

        Raises UnknownLayer, ConfigError or CheckpointError; then everything is as it was. Files are read on the hosts: `checkpoint` must
        be there, and here.
        """
        return await self._to_its_end(self._swap(Swap(layer, checkpoint, None if experts is None else frozenset(experts))))

    async def scale(self, num_hosts: int) -> Release:
        """Spread the experts over so many hosts: new ones start, or the last ones leave. Raises ConfigError; then all is as it was."""
        return await self._to_its_end(self._scale(num_hosts))

    async def drain(self, host: str) -> Release:
        """Place the experts of a host on the others, and let it go. Raises ConfigError when there is no such host, or no room."""
        return await self._to_its_end(self._drain(host))

    async def move(self, seats: Sequence[Seat]) -> Release:
        """Have the experts on these hosts, and let the others go. Raises ConfigError; then all is as it was."""
        return await self._to_its_end(self._alone(seats))

    async def _to_its_end(self, change: Coroutine[Any, Any, Release]) -> Release:
        """A caller who hangs up does not leave a change half made."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _swap(self, swap: Swap) -> Release:
        async with self._one_at_a_time:
            self._epoch += 1
            release = self.release.swapped(swap, self._epoch)
            await self._bring_in(release, self.seats)
            log.info(
                "epoch %d: layer %s has revision %d, from %s", release.epoch, swap.layer, release.revision(swap.layer), swap.checkpoint
            )
            return release

    async def _alone(self, seats: Sequence[Seat]) -> Release:
        async with self._one_at_a_time:
            return await self._move(seats)

    async def _scale(self, num_hosts: int) -> Release:
        async with self._one_at_a_time:
            wanted = wanted_hosts(self._config, await asyncio.to_thread(self.release.sources, self._config))
            wanted = replace(wanted, num_hosts=num_hosts)
            seating = reconcile(await self._nodes(), self.seats, wanted, self._next_number)
            if seating.shortage is not None:
                raise ConfigError(seating.shortage)
            return await self._move(seating.seats)

    async def _drain(self, host: str) -> Release:
        async with self._one_at_a_time:
            names = {f"host-{seat.number}": seat for seat in self.seats}
            if host not in names:
                raise ConfigError(f"there is no host {host!r}; there are {', '.join(names)}")
            return await self._move([seat for name, seat in names.items() if name != host])

    async def _move(self, seats: Sequence[Seat]) -> Release:
        numbers = [seat.number for seat in seats]
        if not numbers:
            raise ConfigError("at least one host is needed")
        if tuple(seats) == self.seats:
            return self.release
        self._epoch += 1
        self._next_number = max(self._next_number, max(numbers) + 1)
        placing = self._config.placement.model_copy(update={"num_hosts": len(numbers), "experts_per_host": None})
        sources = await asyncio.to_thread(self.release.sources, self._config)
        placement = plan_placement([source.spec for source in sources], placing).renumbered(numbers, self._epoch)
        check_memory(host_bytes(sources, placement), self._config, memory_bytes())
        release, gone = replace(self.release, placement=placement), set(self.release.placement.hosts) - set(numbers)
        await self._bring_in(release, seats)
        await self._hosts.remove(sorted(gone))
        log.info("epoch %d: experts stand on hosts %s", release.epoch, ", ".join(map(str, numbers)))
        return release

    async def _let_go(self) -> None:
        """Batches end as they began; those that wait too long for a host that leaves, because it hangs, begin again with the others."""
        try:
            async with asyncio.timeout(self._config.server.drain_timeout_s):
                await self._frontend.drained()
        except TimeoutError:
            log.warning("epoch %d: batches still wait for hosts that leave; they begin again on the others", self.release.epoch)
        await self._frontend.forget()
        await self._frontend.drained()

    async def _bring_in(self, release: Release, seats: Sequence[Seat]) -> None:
        sources = await asyncio.to_thread(release.sources, self._config)
        try:
            await self._hosts.take(release, seats)
            await self._frontend.welcome(release)
            await self._frontend.try_out(release, sources)
            self._frontend.publish(release, sources)
        except BaseException:  # whatever it was: a release that hosts have and frontends do not would be mistaken for what is served
            await self._frontend.forget()
            await self._hosts.withdraw(release.epoch)
            await self._hosts.remove(sorted(set(release.placement.hosts) - set(self.release.placement.hosts)))
            raise
        self.release, self.seats = release, tuple(seats)
        await self._let_go()
        await self._hosts.retire(release.epoch)
        await self._frontend.refresh()
