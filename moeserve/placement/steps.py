"""A change of placement in steps that read few bytes each. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeserve.placement.constraints import LayerSize
from moeserve.placement.layer import Integers, LayerPlacement, Placement
from moeserve.placement.transition import Change, bytes_on

#: of units and hosts
_Pairs = set[tuple[int, int]]
#: layer, unit and host
_Copy = tuple[int, int, int]


@dataclass(frozen=True)
class Move:
    """A copy of a unit for `target`, instead of the one on `source`; None = one more, or one that is back if it was there before."""

    layer: int
    unit: int
    source: int | None
    target: int
    nbytes: int
    is_back: bool = False


@dataclass(frozen=True, eq=False)
class Memory:
    """Of hosts: bytes of weights that each may hold; least: copies of the units [U] of each layer that are always there, None = all."""

    host_bytes: int
    least: Sequence[Integers] | None = None


def steps(
    sizes: Sequence[LayerSize], before: Placement, after: Placement, max_moved_bytes: int | None, memory: Memory | None = None
) -> list[Placement]:
    """The placements that lead from `before` to `after`, the last of which it is; empty if they are the same.

    For each one, hosts read at most max_moved_bytes, or one expert if that is larger. Copies that only leave, leave in the first. Layer
    by layer, and in turn host by host, so that no host gets many experts before it gives some away. A host that would hold more than its
    `memory`, with the shared experts that come along, gets an expert later, when it has given others away. Where all wait for that, some
    give a copy away before its successor is there, which leaves `memory.least` copies at least; if that leads no further, hosts get the
    others all the same. Otherwise each expert has in every step at least as many copies as before or after, whichever are fewer, and
    no host gives its last expert away before it gets another for which there is room. What is on hosts that are gone moves step by step as
    well: if they are dead rather than drained, take one step.
    """
    changes = [Change.of(old, new) for old, new in zip(before.layers, after.layers, strict=True)]
    if not any(change.arrivals.size or change.departures.size for change in changes):
        return []
    moves = [move for number, change in enumerate(changes) for move in _moves(number, sizes[number], change)]
    num_hosts = max(before.num_hosts, after.num_hosts)
    held = [_pairs(layer) for layer in before.layers]
    layers = [_layer(pairs, num_hosts, layer.tensor_parallel) for pairs, layer in zip(held, before.layers, strict=True)]
    walk = _Walk(held, moves, _Filled(sizes, before, num_hosts, memory), memory)
    made: list[Placement] = []
    for changed in walk.steps(max_moved_bytes, [_surplus(change) for change in changes]):
        for layer in changed:
            layers[layer] = _layer(held[layer], num_hosts, layers[layer].tensor_parallel)
        made.append(Placement(before.epoch + len(made) + 1, num_hosts, tuple(layers)))
    return [*made[:-1], after]


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
    """What hosts hold while a step is made: nbytes [D], at most `most` each; physical experts, of all layers `total` [D]."""

    def __init__(self, sizes: Sequence[LayerSize], placement: Placement, num_hosts: int, memory: Memory | None) -> None:
        self._sizes, self.most = sizes, None if memory is None else memory.host_bytes
        self._count = [np.bincount(layer.host_of_physical, minlength=num_hosts) for layer in placement.layers]
        self.total = np.sum(self._count, axis=0)
        self._nbytes = sum(
            (
                bytes_on(size, layer.unit_of_physical, layer.host_of_physical, num_hosts)
                for size, layer in zip(sizes, placement.layers, strict=True)
            ),
            start=np.zeros(num_hosts, dtype=np.int64),
        )

    def nbytes_of(self, layer: int, unit: int) -> int:
        """Of a physical expert."""
        return int(self._sizes[layer].unit_bytes[unit])

    def has_room(self, move: Move, freed: int = 0) -> bool:
        """Beside all that is there but `freed` bytes, for the expert, and for the shared one if it is the first of its layer there."""
        needed = self._nbytes[move.target] - freed + move.nbytes + self._shared(move.layer, move.target)
        return self.most is None or bool(needed <= self.most)

    def makes_room(self, move: Move, layer: int, unit: int) -> bool:
        """Whether there is room when this one has left, which is not the only one there."""
        return self.total[move.target] > 1 and self.has_room(move, freed=self.nbytes_of(layer, unit))

    def get(self, move: Move) -> None:
        """The target holds it, too."""
        self._nbytes[move.target] += move.nbytes + self._shared(move.layer, move.target)
        self._count[move.layer][move.target] += 1
        self.total[move.target] += 1

    def give(self, layer: int, unit: int, host: int) -> None:
        """It is not there any more."""
        self._count[layer][host] -= 1
        self.total[host] -= 1
        self._nbytes[host] -= self.nbytes_of(layer, unit) + self._shared(layer, host)

    def _shared(self, layer: int, host: int) -> int:
        return 0 if self._count[layer][host] else self._sizes[layer].shared_bytes


class _Walk:
    """From step to step. held: of each layer, in the last step that was made; left: what has not moved yet."""

    def __init__(self, held: list[_Pairs], left: list[Move], filled: _Filled, memory: Memory | None) -> None:
        self._held, self._left, self._filled = held, left, filled
        self._least = None if memory is None else memory.least

    def steps(self, max_moved_bytes: int | None, surplus: Sequence[_Pairs]) -> Iterator[set[int]]:
        """The layers that change in each; `surplus` of each layer leaves in the first, alone if nothing has room before it is gone."""
        leaving: list[_Copy] = [(layer, unit, host) for layer, pairs in enumerate(surplus) for unit, host in pairs]
        while leaving or self._left:
            begun, leaving, last = self._next(max_moved_bytes, leaving)
            for move in begun:
                self._held[move.layer].add((move.unit, move.target))
            for layer, unit, host in leaving:
                self._held[layer].discard((unit, host))
            yield {move.layer for move in begun} | {layer for layer, _, _ in leaving}
            for layer, unit, host in leaving:
                self._filled.give(layer, unit, host)
            leaving = last

    def _next(self, max_moved_bytes: int | None, leaving: list[_Copy]) -> tuple[list[Move], list[_Copy], list[_Copy]]:
        """What comes and what leaves in the next step, and what leaves in a later one, so that its host has something until then."""
        begun = self._begun(max_moved_bytes)
        leaving, last = self._but_last([*leaving, *_sources(begun)])
        if not begun and not leaving:
            leaving = self._given_up()
        if not begun and not leaving:  # no way leads on: the caller has to see that, and need not wait until ever longer ones are tried
            self._filled.most = None
            begun = self._begun(max_moved_bytes)
            leaving, last = self._but_last(_sources(begun))
        return begun, leaving, last

    def _but_last(self, leaving: Sequence[_Copy]) -> tuple[list[_Copy], list[_Copy]]:
        """Those that may leave, and one copy of each host that all would leave, although others may come beside it in a later step."""
        number = Counter(host for _, _, host in leaving)
        emptied = {host for host in number if number[host] == self._filled.total[host]}
        waiting = {move.target for move in self._left if move.target in emptied and self._filled.has_room(move)}
        last = {copy[2]: copy for copy in leaving if copy[2] in waiting}
        return [copy for copy in leaving if last.get(copy[2]) != copy], [*last.values()]

    def _begun(self, max_moved_bytes: int | None) -> list[Move]:
        """What can be moved at once, nothing if no host has room."""
        begun: list[Move] = []
        later: list[Move] = []
        nbytes = 0
        for number, move in enumerate(self._left):
            if begun and max_moved_bytes is not None and nbytes + move.nbytes > max_moved_bytes:
                later += self._left[number:]
                break
            if not self._filled.has_room(move):
                later.append(move)
                continue
            begun.append(move)
            nbytes += move.nbytes
            self._filled.get(move)
        self._left = later
        return begun

    def _given_up(self) -> list[_Copy]:
        """Copies that leave early, so that there is room for the first expert that each host waits for.

        Those whose successors come later; if there are none, some that come back, of experts with as many copies as can be.
        """
        if self._least is None:
            return []
        copies = [Counter(unit for unit, _ in pairs) for pairs in self._held]
        moving = {(move.layer, move.unit, move.source): number for number, move in enumerate(self._left) if move.source is not None}
        chosen = self._chosen(moving, copies)
        for copy in chosen:
            self._left[moving[copy]] = replace(self._left[moving[copy]], source=None)
        if not chosen:
            every = [(layer, *pair) for layer, pairs in enumerate(self._held) for pair in pairs]
            chosen = self._chosen(sorted(every, key=lambda copy: (-copies[copy[0]][copy[1]], copy)), copies)
            self._left += [Move(*copy[:2], None, copy[2], self._filled.nbytes_of(*copy[:2]), is_back=True) for copy in chosen]
        return chosen

    def _chosen(self, offered: Iterable[_Copy], copies: Sequence[Counter[int]]) -> list[_Copy]:
        """Of these copies, one of each expert and host at most: those that make room, and of which there are more than are needed.

        `copies` of each unit, by layer.
        """
        assert self._least is not None, "asked only then"
        waiting = {move.target: move for move in reversed(self._left) if not move.is_back}
        chosen: dict[tuple[int, int], int] = {}
        for layer, unit, host in offered:
            is_spare = copies[layer][unit] > self._least[layer][unit] and (layer, unit) not in chosen
            if is_spare and host in waiting and self._filled.makes_room(waiting[host], layer, unit):
                del waiting[host]
                chosen[layer, unit] = host
        return [(*unit, host) for unit, host in chosen.items()]


def _sources(moves: Sequence[Move]) -> list[_Copy]:
    return [(move.layer, move.unit, move.source) for move in moves if move.source is not None]


def _layer(pairs: _Pairs, num_hosts: int, shards: int) -> LayerPlacement:
    units, hosts = np.array(sorted(pairs)).T
    return LayerPlacement.of(num_hosts, units, hosts, shards)
