"""What a frontend has to do, over all layers, and how long it will take; pure, `now` is an argument.

The layers share the hosts, so batches on their way are counted as if they were computed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from moeserve.errors import Overloaded
from moeserve.frontend.batch_cost import BatchCost
from moeserve.frontend.callers import Caller, Callers
from moeserve.frontend.fair_queue import BatchLimits, FairQueue, Turn

#: of the time that a request has, a batch may be expected to take one part in so many: estimates err, and the answer has to travel
CAUTION: Final = 2.0
#: with fewer tokens a pass is bound by reading the experts' weights, so cutting a request that nobody waits behind would only cost time
_LEAST_ALONE: Final = 512
#: the weight of the newest among the batches of which the usual size is known
_NEWEST: Final = 1 / 8


@dataclass(eq=False)
class LayerLoad:
    """What waits for one layer, and what its batches cost.

    `usual_tokens` is how large batches have become lately while there was more to do than went into one.
    """

    queue: FairQueue[Any]
    cost: BatchCost
    max_batch_tokens: int
    usual_tokens: float
    #: to be called when one of its batches may be sent
    on_room: Callable[[], None]
    #: to be called for a waiting request that makes room for another caller's; it is no longer held then
    push_out: Callable[[Any, Overloaded], None]
    last_began: float = 0.0
    #: how long it has lately taken until the rows of a batch were on their way
    send_s: float = 0.0

    @property
    def max_turn_tokens(self) -> int:
        """A request of more tokens is cut."""
        return max(self.max_batch_tokens, _LEAST_ALONE)

    def request_s(self, tokens: int) -> float:
        """Seconds of a request of `tokens`, in as many turns as it needs."""
        if tokens <= self.max_turn_tokens:
            return self.cost(tokens)
        turns = ceil(tokens / self.max_turn_tokens)
        return turns * self.cost(tokens / turns)


@dataclass(eq=False)
class Flight:
    """A batch on its way: since when, and how long it is expected to keep the hosts busy."""

    load: LayerLoad
    tokens: int
    callers: tuple[Caller, ...]
    began: float
    cost_s: float


class Backlog:
    """Waiting requests of all layers, and batches on their way."""

    def __init__(self) -> None:
        self.callers = Callers()
        self._loads: list[LayerLoad] = []
        self._flights: set[Flight] = set()
        self._in_flight_s = 0.0
        #: since when the hosts have had nothing else to do than the oldest batch on its way
        self._since = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and nothing is on its way."""
        return not self._flights and not self.callers.waiting

    def add_layer(self, max_batch_tokens: int, on_room: Callable[[], None], push_out: Callable[[Any, Overloaded], None]) -> LayerLoad:
        """The load of one more layer, for which more may be sent whenever `on_room` is called, and whose requests `push_out` ends."""
        self._loads.append(LayerLoad(FairQueue(self.callers), BatchCost(), max_batch_tokens, max_batch_tokens, on_room, push_out))
        return self._loads[-1]

    def untaken(self, caller: Caller) -> list[tuple[LayerLoad, Any]]:
        """The waiting requests of `caller` that have had no turn yet, with their layers, those that are due last first."""
        found = [(load, request) for load in self._loads for request in load.queue.untaken(caller)]
        return sorted(found, key=lambda one: -one[1].deadline)

    def ready_at(self, load: LayerLoad, now: float) -> float:
        """When the next batch of `load` should be sent: `now`, or later while the hosts have a larger one of it to compute.

        Behind that one it would wait on the hosts; here it may become as large meanwhile. So requests that come one by one end up in two
        batches of the same size that take turns, rather than in one large batch and many small ones.
        """
        largest = max([flight.tokens for flight in self._flights if flight.load is load], default=0)
        if load.queue.tokens >= min(largest, load.max_batch_tokens):
            return now
        return now + max(0.0, self._busy_s(now) - load.send_s)

    def next_batch(self, load: LayerLoad, now: float) -> tuple[list[Turn[Any]], list[Any]]:
        """Taken from the queue: what runs next, and the requests that are due before they could be answered.

        Nothing is lost that would find the hosts idle: it shows what a batch costs by now.
        """
        taken = self._take(load, now)
        if not self._flights:
            return taken, []
        end = now + self._busy_s(now) + load.cost(sum(turn.tokens for turn in taken))
        late = [turn.request for turn in taken if turn.request.deadline < end]
        return [turn for turn in taken if turn.request.deadline >= end] if late else taken, late

    def _take(self, load: LayerLoad, now: float) -> list[Turn[Any]]:
        only, greedy_from = load.queue.only, self.callers.greedy_from(now)
        if only is not None and only.waiting <= min(load.max_turn_tokens, self._most_of(only.caller, load, greedy_from)):
            return [load.queue.give(only.caller, only.waiting)]

        def fits(tokens: int, deadline: float) -> bool:
            return tokens <= load.max_batch_tokens and self._busy_s(now) + load.cost(tokens) <= (deadline - now) / CAUTION

        return load.queue.take(BatchLimits(fits, lambda caller: self._most_of(caller, load, greedy_from), load.max_turn_tokens))

    def begin(self, load: LayerLoad, turns: Sequence[Turn[Any]], now: float) -> Flight:
        """`turns` are sent."""
        if not self._flights:
            self._since = now
        tokens = turns[0].tokens if len(turns) == 1 else sum([turn.tokens for turn in turns])
        callers = (turns[0].request.caller,) if len(turns) == 1 else tuple({turn.request.caller for turn in turns})
        flight = Flight(load, tokens, callers, now, load.cost(tokens))
        for caller in flight.callers:
            caller.in_flight += 1
        if load.queue:
            load.usual_tokens += _NEWEST * (tokens - load.usual_tokens)
        load.last_began = now
        self._flights.add(flight)
        self._in_flight_s += flight.cost_s
        return flight

    def sent(self, load: LayerLoad, seconds: float) -> None:
        """It took so long until the rows of a batch of `load` were on their way."""
        load.send_s += _NEWEST * (seconds - load.send_s)

    def end(self, flight: Flight, now: float, is_answered: bool) -> None:
        """It is over; one that failed says nothing of what batches cost."""
        self._flights.remove(flight)
        for caller in flight.callers:
            caller.in_flight -= 1
        # Not what it was minus that: rounding would add up.
        self._in_flight_s = sum([other.cost_s for other in self._flights]) if self._flights else 0.0
        if is_answered:
            flight.load.cost.learn(flight.tokens, now - max(self._since, flight.began))
        self._since = now
        if self.callers.waiting:
            # What has not been given anything for the longest comes first: one caller has a single turn for all its layers.
            for load in sorted((load for load in self._loads if load.queue), key=lambda load: load.last_began):
                load.on_room()

    def wait_s(self, caller: Caller, tokens: int, deadline: float, load: LayerLoad | None, now: float) -> float:
        """How long a request of `tokens` for a layer (None = any) is expected to wait for what is ahead of it in fair order."""
        if not self.callers.waiting:
            return self._busy_s(now)
        own = caller.waiting_tokens - (0 if load is None else load.queue.behind(caller, deadline, load.request_s(tokens)))
        share = self.callers.ahead_of(caller, own, tokens) / sum(one.queue.tokens for one in self._loads)
        return self._busy_s(now) + self._queued_s() * min(1.0, share)

    def all_s(self, now: float) -> float:
        """How long everything that there is to do is expected to take."""
        return self._busy_s(now) + self._queued_s()

    def _queued_s(self) -> float:
        return sum(load.cost.of_many(load.queue.tokens, load.usual_tokens) for load in self._loads if load.queue)

    def _busy_s(self, now: float) -> float:
        """How long the batches on their way are expected to take from now on."""
        return max(0.0, self._in_flight_s - (now - self._since)) if self._flights else 0.0

    def _most_of(self, caller: Caller, load: LayerLoad, greedy_from: float) -> float:
        """Tokens of one caller in a batch.

        What a greedy one has on its way takes not much longer than it takes to run a batch at all, or than the batches of another layer
        take, so that the small requests of others do not wait for much longer than their own batches take.
        """
        if caller.held_tokens <= greedy_from:
            return float("inf")
        if caller.in_flight:
            return 0.0
        turn_s = min(load.cost.fixed_s, *(other.cost.usual_s for other in self._loads))
        return max(1.0, load.cost.tokens_of(turn_s))
