"""Which hosts should run on which nodes: a pure function of the nodes, the current assignments and the desired state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from moeserve.control.assignments import Assigned, Assignment, Node, Wanted
from moeserve.control.shortage import describe

_NO_LIMIT = 2**31


def reconcile(
    nodes: Sequence[Node], assignments: Sequence[Assignment], wanted: Wanted, next_number: int, given_up: Collection[int] = ()
) -> Assigned:
    """The next assignments, given the live `nodes` and the current `assignments`; hosts in `given_up` do not come back.

    A host stays where it is as long as its node lives, is not leaving and has the labels. Others are replaced by new numbers, from
    `next_number` on, where there is room. Of too many, those leave that make the rest as even (or, with "pack", as dense) as it can be,
    the highest numbers first. Where fewer than wanted fit, as many as fit; where fewer than `wanted.least` fit, all stays as it is.
    In both cases `shortage` says why. Idempotent: a healthy service is left alone.
    """
    places = {node.id: node for node in nodes if is_place(node, wanted)}
    kept = _kept([assignment for assignment in assignments if assignment.node in places and assignment.number not in given_up], wanted)
    held = Counter(assignment.node for assignment in kept)
    room = {key: max(room_on(node, wanted), held[key]) for key, node in places.items()}
    fit = sum(room.values())
    number = _number(wanted, fit)
    missing = max(0, number - fit)
    shortage = describe(nodes, room, wanted, number) if missing else None
    if fit < min(wanted.least, number):
        return Assigned(_by_number(assignments), shortage, missing)
    kept = _without_surplus(kept, number, wanted)
    return Assigned(_by_number([*kept, *_added(kept, room, min(number, fit), wanted, next_number)]), shortage, missing)


def is_place(node: Node, wanted: Wanted) -> bool:
    """Whether hosts may be put on `node`, if there is room."""
    return not node.is_leaving and wanted.labels.items() <= node.labels.items()


def room_on(node: Node, wanted: Wanted) -> int:
    """How many hosts fit on `node`, including its present ones."""
    limits = [1] if wanted.strategy == "strict_spread" else []
    if wanted.cpus:
        limits.append(_fit(node.free.get("CPU", 0), wanted.cpus))
    if wanted.gpus:
        limits.append(_fit_gpus(node.free.get("GPU", 0), wanted.gpus))
    if not limits and wanted.num_hosts == "all":
        return 1  # any number of hosts without resources would fit
    return min(limits, default=_NO_LIMIT)


def _fit(free: float, each: float) -> int:
    return math.floor(max(0.0, free) / each + 1e-9)


def _fit_gpus(free: float, each: float) -> int:
    """A fraction belongs to one GPU: the rest of several GPUs does not add up."""
    if each >= 1:
        return _fit(free, each)
    whole = math.floor(max(0.0, free) + 1e-9)
    return whole * _fit(1, each) + _fit(free - whole, each)


def _number(wanted: Wanted, fit: int) -> int:
    if wanted.num_hosts != "all":
        return wanted.num_hosts
    return max(wanted.least, fit if wanted.most is None else min(fit, wanted.most))


def _kept(assignments: Sequence[Assignment], wanted: Wanted) -> list[Assignment]:
    """Assignments that can stay; if only one may be on a node, its first."""
    ordered = _by_number(assignments)
    if wanted.strategy != "strict_spread":
        return list(ordered)
    return list({assignment.node: assignment for assignment in reversed(ordered)}.values())


def _without_surplus(assignments: Sequence[Assignment], number: int, wanted: Wanted) -> list[Assignment]:
    left = list(assignments)
    while len(left) > number:
        held = Counter(assignment.node for assignment in left)
        sign = -1 if wanted.strategy == "pack" else 1
        left.remove(max(left, key=lambda assignment: (sign * held[assignment.node], assignment.number)))
    return left


def _added(kept: Sequence[Assignment], room: Mapping[str, int], number: int, wanted: Wanted, next_number: int) -> list[Assignment]:
    """The missing hosts, one by one: on the node with the fewest hosts that has room, or with the most, to fill it up."""
    held = Counter(assignment.node for assignment in kept)
    sign = -1 if wanted.strategy == "pack" else 1
    added = []
    for new in range(next_number, next_number + number - len(kept)):
        node = min((key for key in room if held[key] < room[key]), key=lambda key: (sign * held[key], held[key] - room[key], key))
        held[node] += 1
        added.append(Assignment(new, node))
    return added


def _by_number(assignments: Sequence[Assignment]) -> tuple[Assignment, ...]:
    return tuple(sorted(assignments, key=lambda assignment: assignment.number))
