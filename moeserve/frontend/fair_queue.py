"""Which of the waiting requests of a layer run next; pure, with what it must know as arguments.

Between callers: Start-time Fair Queueing (Goyal, Vin, Cheng, SIGCOMM 1996), counted in tokens, as the Virtual Token Counter is (Sheng et
al., Fairness in Serving Large Language Models, OSDI 2024): whoever has been given the fewest tokens is next. Within a caller: earliest
deadline first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import count
from operator import attrgetter
from typing import Final, Generic, Protocol, TypeVar

from moeserve.frontend.callers import Caller, Callers

_ORDER: Final = attrgetter("order")


class Queued(Protocol):
    """One request. `deadline` is a time in seconds; `order`, its place among those of its caller, is the queue's own."""

    caller: Caller
    deadline: float
    order: tuple[float, int]

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        ...

    @property
    def join_key(self) -> Hashable:
        """Only requests of the same key run together."""
        ...


@dataclass(frozen=True)
class BatchLimits:
    """Of a batch. `fits(tokens, deadline)`: whether it may have so many tokens when the most urgent of its requests is due at `deadline`.

    Once a caller has `most_of(caller)` tokens in it, only others join.
    """

    fits: Callable[[int, float], bool]
    most_of: Callable[[Caller], float]


R = TypeVar("R", bound=Queued)


class FairQueue(Generic[R]):
    """The waiting requests of one layer; `callers` are those of all layers."""

    def __init__(self, callers: Callers) -> None:
        self.tokens = 0
        self._callers = callers
        self._lanes: dict[Caller, list[R]] = {}
        self._numbers = count()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def add(self, request: R) -> None:
        """`request` waits, behind those of its caller that are due no later."""
        request.order = request.deadline, next(self._numbers)
        lane = self._lanes.get(request.caller)
        if lane is None:
            self._lanes[request.caller] = [request]
        elif request.order > lane[-1].order:
            lane.append(request)
        else:
            insort(lane, request, key=_ORDER)
        self._count(request.caller, request.tokens)

    def remove(self, request: R) -> None:
        """`request` does not wait any more; nothing happens if it does not."""
        lane = self._lanes.get(request.caller)
        if lane is None:
            return
        place = bisect_left(lane, request.order, key=_ORDER)
        if place < len(lane) and lane[place] is request:
            self._pop(request.caller, place)

    def due_after(self, caller: Caller, deadline: float) -> int:
        """Tokens of `caller` that go behind a new request of it."""
        lane = self._lanes.get(caller)
        if lane is None or lane[-1].deadline <= deadline:
            return 0
        return sum(request.tokens for request in lane[bisect_left(lane, (deadline, float("inf")), key=_ORDER) :])

    @property
    def only(self) -> R | None:
        """The one request that waits; None = none does, or more than one."""
        if len(self._lanes) == 1:
            (lane,) = self._lanes.values()
            return lane[0] if len(lane) == 1 else None
        return None

    def take(self, limits: BatchLimits) -> list[R]:
        """The next batch: in fair order, until the next request does not fit or cannot join. The first one always fits."""
        left = {caller: limits.most_of(caller) for caller in self._lanes}
        lanes = [(caller.given, number, caller) for number, caller in enumerate(left) if left[caller] > 0]
        heapify(lanes)
        members: list[R] = []
        tokens, deadline = 0, float("inf")
        while lanes:
            _, number, caller = lanes[0]
            request = self._lanes[caller][0]
            tokens, deadline = tokens + request.tokens, min(deadline, request.deadline)
            if members and (request.join_key != members[0].join_key or not limits.fits(tokens, deadline)):
                break
            members.append(self.give(caller))
            left[caller] -= request.tokens
            if caller in self._lanes and left[caller] > 0:
                heapreplace(lanes, (caller.given, number, caller))
            else:
                heappop(lanes)
        return members

    def give(self, caller: Caller) -> R:
        """Taken from the queue: the next request of `caller`."""
        request = self._pop(caller, 0)
        self._callers.level = max(self._callers.level, caller.given)
        caller.given += request.tokens
        return request

    def _pop(self, caller: Caller, place: int) -> R:
        lane = self._lanes[caller]
        request = lane.pop(place)
        if not lane:
            del self._lanes[caller]
        self._count(caller, -request.tokens)
        return request

    def _count(self, caller: Caller, tokens: int) -> None:
        self.tokens += tokens
        self._callers.count_waiting(caller, tokens)
