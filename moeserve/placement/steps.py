"""A change of placement in steps that read few bytes each. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moeserve.placement.constraints import LayerSize
from moeserve.placement.layer import Integers, LayerPlacement, Placement
from moeserve.placement.transition import Change, bytes_on

#: of units and hosts; None stands for the source of a further copy
_Pairs = set[tuple[int, int | None]]


@dataclass(frozen=True)
class Move:
    """A copy of a unit for `target`, instead of the one on `source`; None = one more."""

    layer: int
    unit: int
    source: int | None
    target: int
    nbytes: int


def steps(
    sizes: Sequence[LayerSize], before: Placement, after: Placement, max_moved_bytes: int | None, max_host_bytes: int | None = None
) -> list[Placement]:
    """The placements that lead from `before` to `after`, the last of which it is; empty if they are the same.

    For each one, hosts read at most max_moved_bytes, or one expert if that is larger. Copies that only leave, leave in the first. Layer
    by layer, and in turn host by host, so that no host gets many experts before it gives some away. A host that would hold more than
    max_host_bytes, with the shared experts that come along, gets an expert later, when it has given others away; if that can never be, it
    gets it all the same. In every step each expert has at least as many copies as before or after, whichever are fewer. What is on hosts
    that are gone moves step by step as well: if they are dead rather than drained, take one step.
    """
    changes = [Change.of(old, new) for old, new in zip(before.layers, after.layers, strict=True)]
    if not any(change.arrivals.size or change.departures.size for change in changes):
        return []
    moves = [move for number, change in enumerate(changes) for move in _moves(number, sizes[number], change)]
    num_hosts = max(before.num_hosts, after.num_hosts)
    surplus = [_surplus(change) for change in changes]
    rounds = list(_rounds(moves, max_moved_bytes, _Filled(sizes, before, num_hosts, max_host_bytes), surplus))
    held = [_pairs(layer) - more for layer, more in zip(before.layers, surplus, strict=True)]
    layers = [_layer(pairs, num_hosts, layer.tensor_parallel) for pairs, layer in zip(held, before.layers, strict=True)]
    made = []
    for number, moved in enumerate(rounds[:-1], 1):
        for move in moved:
            held[move.layer].discard((move.unit, move.source))
            held[move.layer].add((move.unit, move.target))
        for layer in {move.layer for move in moved}:
            layers[layer] = _layer(held[layer], num_hosts, layers[layer].tensor_parallel)
        made.append(Placement(before.epoch + number, num_hosts, tuple(layers)))
    return [*made, after]


def without_surplus(before: Placement, after: Placement, down: Collection[int]) -> Placement:
    """`before` without the copies that `after` does not have there, so that hosts have room for what others lose.

    Of every unit that is on hosts that are up, one is left there. What is on those that are `down` stays as it is: one may still answer
    although nobody can tell it anything, and then computes what it has.
    """
    layers = []
    for old, new in zip(before.layers, after.layers, strict=True):
        up = {pair for pair in _pairs(old) if pair[1] not in down}
        held = up & _pairs(new)
        known = {unit for unit, _ in held}
        held |= {pair for pair in up if pair[0] not in known}
        layers.append(_layer(held | _pairs(old) - up, before.num_hosts, old.tensor_parallel))
    return Placement(before.epoch + 1, before.num_hosts, tuple(layers))


def _moves(layer: int, size: LayerSize, change: Change) -> list[Move]:
    """Every arrival, with a departure of the same unit if there is one; the first of each host, then the second of each."""
    left = _by_unit(change.departures)
    rank: dict[int, int] = defaultdict(int)
    moves = []
    for unit, target in change.arrivals.T.tolist():
        source = left[unit].pop(0) if left[unit] else None
        moves.append((rank[target], Move(layer, unit, source, target, int(size.unit_bytes[unit]))))
        rank[target] += 1
    return [move for _, move in sorted(moves, key=lambda each: each[0])]


def _surplus(change: Change) -> _Pairs:
    """Copies that leave without another in their place."""
    left = _by_unit(change.departures)
    for unit in change.arrivals[0].tolist():
        del left[unit][:1]
    return {(unit, host) for unit, hosts in left.items() for host in hosts}


def _pairs(layer: LayerPlacement) -> _Pairs:
    return set(zip(layer.unit_of_physical.tolist(), layer.host_of_physical.tolist(), strict=True))


def _by_unit(pairs: Integers) -> dict[int, list[int]]:
    hosts: dict[int, list[int]] = defaultdict(list)
    for unit, host in pairs.T.tolist():
        hosts[unit].append(host)
    return hosts


class _Filled:
    """What hosts hold while a step is made: nbytes [D]; of each layer, physical experts [D] and bytes of units [U]."""

    def __init__(self, sizes: Sequence[LayerSize], placement: Placement, num_hosts: int, most: int | None) -> None:
        self._sizes, self._most = sizes, most
        self._count = [np.bincount(layer.host_of_physical, minlength=num_hosts) for layer in placement.layers]
        self._nbytes = sum(
            (
                bytes_on(size, layer.unit_of_physical, layer.host_of_physical, num_hosts)
                for size, layer in zip(sizes, placement.layers, strict=True)
            ),
            start=np.zeros(num_hosts, dtype=np.int64),
        )

    def has_room(self, move: Move) -> bool:
        """Beside all that is there, for the expert, and for the shared one if it is the first of its layer there."""
        return self._most is None or bool(self._nbytes[move.target] + move.nbytes + self._shared(move.layer, move.target) <= self._most)

    def get(self, move: Move) -> None:
        """The target holds it, too."""
        self._nbytes[move.target] += move.nbytes + self._shared(move.layer, move.target)
        self._count[move.layer][move.target] += 1

    def give(self, layer: int, unit: int, host: int) -> None:
        """It is not there any more."""
        self._count[layer][host] -= 1
        self._nbytes[host] -= int(self._sizes[layer].unit_bytes[unit]) + self._shared(layer, host)

    def _shared(self, layer: int, host: int) -> int:
        return 0 if self._count[layer][host] else self._sizes[layer].shared_bytes


def _rounds(moves: Sequence[Move], max_moved_bytes: int | None, filled: _Filled, surplus: Sequence[_Pairs]) -> Iterator[list[Move]]:
    """`surplus` of each layer leaves in the first one, alone if nothing has room before it is gone."""
    left = list(moves)
    leaving = [(layer, unit, host) for layer, pairs in enumerate(surplus) for unit, host in pairs]
    while True:
        begun, left = _round(left, max_moved_bytes, filled)
        if not begun and left and not leaving:
            begun, left = left[:1], left[1:]
            filled.get(begun[0])
        yield begun
        if not left:
            return
        leaving += [(move.layer, move.unit, move.source) for move in begun]
        for layer, unit, host in leaving:
            if host is not None:
                filled.give(layer, unit, host)
        leaving.clear()


def _round(moves: Sequence[Move], max_moved_bytes: int | None, filled: _Filled) -> tuple[list[Move], list[Move]]:
    """What can be moved at once, nothing if no host has room, and what is left."""
    begun: list[Move] = []
    later: list[Move] = []
    nbytes = 0
    for number, move in enumerate(moves):
        if begun and max_moved_bytes is not None and nbytes + move.nbytes > max_moved_bytes:
            return begun, [*later, *moves[number:]]
        if not filled.has_room(move):
            later.append(move)
            continue
        begun.append(move)
        nbytes += move.nbytes
        filled.get(move)
    return begun, later


def _layer(pairs: _Pairs, num_hosts: int, shards: int) -> LayerPlacement:
    units, hosts = np.array(sorted(pairs)).T
    return LayerPlacement.of(num_hosts, units, hosts, shards)
