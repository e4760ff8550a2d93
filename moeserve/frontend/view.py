"""The view of one batch: one epoch from beginning to end, even if another is published meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moeserve.config import CopyChoice
from moeserve.frontend.health import HostHealth
from moeserve.frontend.link import HostLink
from moeserve.layer.dispatch import HostLoads
from moeserve.layer.head import LayerHead
from moeserve.placement import LayerPlacement


@dataclass(frozen=True, eq=False)
class LayerView:
    """A layer at one epoch: the placement of its experts, and the weights and gate of `revision`.

    `links` are to the hosts of that epoch, by number. The mapping never changes, so any thread may read it; a host that leaves closes its
    link.
    """

    epoch: int
    revision: int
    head: LayerHead
    placement: LayerPlacement
    links: Mapping[int, HostLink]

    def loads(self, copy_choice: CopyChoice, without: Collection[int] = ()) -> HostLoads | None:
        """What a plan must know of the hosts now; None where experts have one copy each, and there is nothing to choose.

        Hosts `without` which it shall do count as down.
        """
        return None if self.placement.copies.shape[1] == 1 else self.all_loads(copy_choice, without)

    def all_loads(self, copy_choice: CopyChoice, without: Collection[int] = ()) -> HostLoads:
        """As `loads`, also where only the shared expert is on several hosts."""
        is_live = np.zeros(self.placement.num_hosts, dtype=np.bool_)
        load = np.zeros(self.placement.num_hosts, dtype=np.int64)
        for number, link in self.links.items():
            is_live[number], load[number] = number not in without and link.is_live_at(self.epoch), link.queue_tokens
        return HostLoads(is_live, load, copy_choice)

    def late_hosts(self) -> list[int]:
        """The numbers of those that have not answered what they would have answered by now, as a rule."""
        return [number for number, link in self.links.items() if link.is_late]

    def health(self, host: int, rows: int) -> HostHealth:
        """A host now; what is late for it, of a message of so many rows."""
        return self.links[host].health(self.epoch, rows)


class Views:
    """The view of new batches, and the number of batches that use each epoch."""

    def __init__(self, view: LayerView) -> None:
        self.current = view
        self._running: Counter[int] = Counter()
        self._left = asyncio.Event()

    @contextmanager
    def use(self) -> Iterator[LayerView]:
        """The current view, for one batch."""
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
        """The earliest epoch of a running or new batch."""
        return min(self._running, default=self.current.epoch)

    def publish(self, view: LayerView) -> None:
        """New batches use `view`."""
        assert view.epoch > self.current.epoch, "epochs only grow"
        self.current = view

    async def drained(self) -> None:
        """Returns when no batch uses an earlier epoch than the current one."""
        while self.oldest_epoch < self.current.epoch:
            self._left.clear()
            await self._left.wait()
