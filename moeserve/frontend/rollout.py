"""Bringing in a new release while requests run: none fails, and none is answered by a mix of two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moeserve.checkpoints import LayerSource, Swap
from moeserve.config import ServiceConfig
from moeserve.errors import MoEServeError
from moeserve.release import Release

log = logging.getLogger(__name__)


class Hosts(Protocol):
    """All expert hosts."""

    async def take(self, release: Release) -> None:
        """Every host can serve `release` beside what it serves. Raises what a host raised."""
        ...

    async def withdraw(self, epoch: int) -> None:
        """The release of `epoch` will not be."""
        ...

    async def retire(self, epoch: int) -> None:
        """Nobody asks for what was before `epoch` any more."""
        ...


class Publisher(Protocol):
    """All frontends."""

    def publish(self, release: Release, sources: Sequence[LayerSource]) -> None:
        """Batches that begin from now on use `release`."""
        ...

    async def drained(self) -> None:
        """Until no batch uses an earlier one."""
        ...


class Rollout:
    """Make before break: hosts load, frontends switch, running batches end, hosts forget (one change at a time)."""

    def __init__(self, config: ServiceConfig, release: Release, hosts: Hosts, frontend: Publisher) -> None:
        self.release = release
        self._config = config
        self._hosts = hosts
        self._frontend = frontend
        self._epoch = release.epoch
        self._one_at_a_time = asyncio.Lock()

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None = None) -> Release:
        """Serve a layer, or some of its experts, with the weights of another folder of the same model.

        Raises UnknownLayer, ConfigError or CheckpointError; then everything is as it was. Files are read on the hosts: `checkpoint` must
        be there, and here.
        """
        async with self._one_at_a_time:
            self._epoch += 1
            release = self.release.swapped(Swap(layer, checkpoint, None if experts is None else frozenset(experts)), self._epoch)
            await self._bring_in(release)
            log.info("epoch %d: layer %s has revision %d, from %s", release.epoch, layer, release.revision(layer), checkpoint)
            return release

    async def _bring_in(self, release: Release) -> None:
        sources = await asyncio.to_thread(release.sources, self._config)
        try:
            await self._hosts.take(release)
            self._frontend.publish(release, sources)
        except MoEServeError:
            await self._hosts.withdraw(release.epoch)
            raise
        self.release = release
        await self._frontend.drained()
        await self._hosts.retire(release.epoch)
