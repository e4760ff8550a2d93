"""Which of the waiting requests of a layer run next; pure, with what it must know as arguments.

Between callers: Start-time Fair Queueing (Goyal, Vin, Cheng, SIGCOMM 1996), counted in tokens, as the Virtual Token Counter is (Sheng et
al., Fairness in Serving Large Language Models, OSDI 2024): whoever has been given the fewest tokens is next. Within a caller: earliest
deadline first, as if each were due later by the time that it takes: of two that are due together, the small one does not wait for the
large one, and none waits for long behind smaller ones that come later. A large request is cut, as chunked prefill cuts prompts (Agrawal et
al., Sarathi-Serve, OSDI 2024): it runs in several turns, between which others have theirs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import count
from math import ceil
from operator import attrgetter
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from moeserve.frontend.callers import Caller, Callers

_ORDER: Final = attrgetter("order")


class Queued(Protocol):
    """One request. `deadline` is a time in seconds.

    The queue's own are `waiting`, how many of its tokens have not been taken yet, and `order`, its place among those of its caller.
    """

    caller: Caller
    deadline: float
    waiting: int
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

    Once a caller has `most_of(caller)` tokens in it, only others join. A request of more tokens than that, or than `max_turn_tokens`, is
    cut.
    """

    fits: Callable[[int, float], bool]
    most_of: Callable[[Caller], float]
    max_turn_tokens: int


R = TypeVar("R", bound=Queued)


class Turn(NamedTuple, Generic[R]):
    """What is taken of a request: all of its tokens, or those of one turn."""

    request: R
    tokens: int


class FairQueue(Generic[R]):
    """The waiting requests of one layer; `callers` are those of all layers."""

    def __init__(self, callers: Callers) -> None:
        self.tokens = 0
        self._callers = callers
        self._lanes: dict[Caller, list[R]] = {}
        self._numbers = count()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def add(self, request: R, cost_s: float) -> None:
        """`request`, which takes `cost_s`, waits behind those of its caller that are no less urgent."""
        request.waiting = request.tokens
        request.order = request.deadline + cost_s, next(self._numbers)
        lane = self._lanes.get(request.caller)
        if lane is None:
            self._lanes[request.caller] = [request]
        elif request.order > lane[-1].order:
            lane.append(request)
        else:
            insort(lane, request, key=_ORDER)
        self._count(request.caller, request.tokens)

    def remove(self, request: R) -> None:
        """`request` does not wait any more, nor does what is left of it; nothing happens if nothing is."""
        lane = self._lanes.get(request.caller)
        if lane is None:
            return
        place = bisect_left(lane, request.order, key=_ORDER)
        if place < len(lane) and lane[place] is request:
            self._pop(request.caller, place)
            self._count(request.caller, -request.waiting)

    def behind(self, caller: Caller, deadline: float, cost_s: float) -> int:
        """Tokens of `caller` that go behind a new request of it, which is due at `deadline` and takes `cost_s`."""
        lane, place = self._lanes.get(caller), (deadline + cost_s, float("inf"))
        if lane is None or lane[-1].order <= place:
            return 0
        return sum(request.waiting for request in lane[bisect_left(lane, place, key=_ORDER) :])

    @property
    def only(self) -> R | None:
        """The one request that waits; None = none does, or more than one."""
        if len(self._lanes) == 1:
            (lane,) = self._lanes.values()
            return lane[0] if len(lane) == 1 else None
        return None

    def untaken(self, caller: Caller) -> list[R]:
        """The waiting requests of `caller` that have had no turn yet, the most urgent first."""
        return [request for request in self._lanes.get(caller, ()) if request.waiting == request.tokens]

    def take(self, limits: BatchLimits) -> list[Turn[R]]:
        """The next batch: in fair order, until the next request does not fit or cannot join. The first one always fits.

        One that is cut runs alone.
        """
        most = {caller: limits.most_of(caller) for caller in self._lanes}
        left = dict(most)
        lanes = [(caller.given, number, caller) for number, caller in enumerate(left) if left[caller] > 0]
        heapify(lanes)
        members: list[Turn[R]] = []
        tokens, deadline = 0, float("inf")
        while lanes:
            _, number, caller = lanes[0]
            request = self._lanes[caller][0]
            turn = _turn_tokens(request, min(limits.max_turn_tokens, most[caller]))
            if turn < request.tokens:
                return members or [self.give(caller, turn)]
            tokens, deadline = tokens + request.tokens, min(deadline, request.deadline)
            if members and (request.join_key != members[0].request.join_key or not limits.fits(tokens, deadline)):
                break
            members.append(self.give(caller, turn))
            left[caller] -= request.tokens
            if caller in self._lanes and left[caller] > 0:
                heapreplace(lanes, (caller.given, number, caller))
            else:
                heappop(lanes)
        return members

    def give(self, caller: Caller, tokens: int) -> Turn[R]:
        """Taken from the queue: so many tokens of the next request of `caller`."""
        request = self._lanes[caller][0]
        request.waiting -= tokens
        if not request.waiting:
            self._pop(caller, 0)
        self._count(caller, -tokens)
        self._callers.level = max(self._callers.level, caller.given)
        caller.given += tokens
        return Turn(request, tokens)

    def _pop(self, caller: Caller, place: int) -> None:
        lane = self._lanes[caller]
        del lane[place]
        if not lane:
            del self._lanes[caller]

    def _count(self, caller: Caller, tokens: int) -> None:
        self.tokens += tokens
        self._callers.count_waiting(caller, tokens)


def _turn_tokens(request: Queued, most: float) -> int:
    """How many of the waiting tokens may run now: all, or as many as in each of the fewest turns of the same size."""
    return request.waiting if request.waiting <= most else ceil(request.waiting / ceil(request.waiting / most))
