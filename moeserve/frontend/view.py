"""What one batch sees of its layer, from beginning to end: one epoch, whatever is published meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moeserve.frontend.link import HostLink
from moeserve.layer.head import LayerHead
from moeserve.placement import LayerPlacement


@dataclass(frozen=True, eq=False)
class LayerView:
    """A layer at one epoch: where its experts are, and the gate that goes with their weights, which are those of `revision`.

    `links` are to the hosts of that epoch, by number. Nobody changes the mapping, so any thread may read it; a host that leaves closes its
    link.
    """

    epoch: int
    revision: int
    head: LayerHead
    placement: LayerPlacement
    links: Mapping[int, HostLink]


class Views:
    """The view that new batches get, and how many batches still use which epoch."""

    def __init__(self, view: LayerView) -> None:
        self.current = view
        self._running: Counter[int] = Counter()
        self._left = asyncio.Event()
        self._superseded = asyncio.Event()

    @contextmanager
    def use(self) -> Iterator[LayerView]:
        """The present view, for one batch."""
        view = self.current
        self._running[view.epoch] += 1
        try:
            yield view
        finally:
            self._running[view.epoch] -= 1
            if not self._running[view.epoch]:
                del self._running[view.epoch]
            self._left.set()

    @property
    def oldest_epoch(self) -> int:
        """The earliest that a batch still uses, or new ones would."""
        return min(self._running, default=self.current.epoch)

    def publish(self, view: LayerView) -> None:
        """Batches that begin from now on see `view`."""
        assert view.epoch > self.current.epoch, "epochs only grow"
        self.current = view
        self._superseded.set()
        self._superseded = asyncio.Event()

    async def superseded(self, view: LayerView) -> None:
        """Until another view than `view` is the present one."""
        while self.current is view:
            await self._superseded.wait()

    async def drained(self) -> None:
        """Until no batch uses an earlier epoch than the present one."""
        while self.oldest_epoch < self.current.epoch:
            self._left.clear()
            await self._left.wait()
