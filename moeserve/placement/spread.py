"""New hosts take their share of every layer from the others, and nothing else moves.

P physical experts of a layer, D hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from moeserve.placement.draft import LayerDraft
from moeserve.placement.layer import Booleans, Integers

#: after so many new hosts that nothing could move to, the others are not tried: they hold more already
_TRIED: Final = 8
#: of hosts with very many experts of a layer, this share moves at a time
_AT_ONCE: Final = 1 / 64


def spread(drafts: Sequence[LayerDraft], is_new: Booleans) -> None:
    """Moves experts from the busiest old hosts to the least loaded new ones, as long as it makes them more even. is_new [D].

    Then experts whose move changes nothing for their layer move if it makes the bytes of the two hosts, of all layers, more even.
    """
    for by_bytes in (False, True):
        for draft in drafts:
            _Spread(draft, *draft.physical(), by_bytes).run(is_new)


@dataclass(frozen=True, eq=False)
class _Spread:
    """Of one layer. units [P], hosts [P]: which unit each physical expert is, and where it is at present."""

    draft: LayerDraft
    units: Integers
    hosts: Integers
    by_bytes: bool

    def run(self, is_new: Booleans) -> None:
        draft = self.draft
        limit = np.minimum(draft.quota, draft.most_held)
        is_open = is_new & (draft.count < limit)
        tried = 0
        while is_open.any() and tried < _TRIED:
            target = draft.least_loaded(np.flatnonzero(is_open))
            most = min(1 + int(_AT_ONCE * len(self.units) / len(draft.room)), int(limit[target] - draft.count[target]))
            moved = self._fill(target, most, is_new)
            tried = 0 if moved else tried + 1
            is_open[target] = moved and draft.count[target] < limit[target]

    def _fill(self, target: int, most: int, is_new: Booleans) -> bool:
        moved = 0
        for physical in self._offered(target, is_new):
            unit, source = int(self.units[physical]), int(self.hosts[physical])
            if self._pays(np.array([physical]), target)[0] and self.draft.may_move(unit, source, target):
                self.draft.move(unit, source, target)
                self.hosts[physical] = target
                moved += 1
                if moved == most:
                    break
        return moved > 0

    def _offered(self, target: int, is_new: Booleans) -> list[int]:
        """The physical experts of old hosts whose move pays: of the busiest host first, then of the fullest, then the most even."""
        draft, old = self.draft, np.flatnonzero(~is_new[self.hosts])
        chosen = old[self._pays(old, target)]
        weight, hosts = draft.weight[self.units[chosen]], self.hosts[chosen]
        peak = np.maximum(draft.load[hosts] - weight, draft.load[target] + weight)
        ordered: list[int] = chosen[np.lexsort((peak, -draft.room.used[hosts], -draft.load[hosts]))].tolist()
        return ordered

    def _pays(self, physical: Integers, target: int) -> Booleans:
        """Whether the move of each makes the two hosts more even, and there is room for it."""
        draft, room, units, sources = self.draft, self.draft.room, self.units[physical], self.hosts[physical]
        nbytes = draft.size.unit_bytes[units]
        surplus = draft.load[sources] - draft.weight[units] - draft.load[target]
        nothing = 1e-9 * draft.mean
        pays: Booleans = surplus > nothing
        if self.by_bytes:
            pays |= (surplus >= -nothing) & (room.used[sources] - nbytes > room.used[target])
        shared = 0 if draft.count[target] else draft.size.shared_bytes
        pays &= room.used[target] + nbytes + shared <= room.memory[target]
        return pays
