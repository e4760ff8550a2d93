"""Hosts and callers on a clock that only events move: what admission and fair queues make of a load, to the last request, in no time."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from moeserve.errors import Overloaded
from moeserve.frontend.admission import Admission
from moeserve.frontend.callers import Caller
from moeserve.frontend.fair_queue import Turn


@dataclass(eq=False)
class FakeRequest:
    """One in the queue; `asked` is when."""

    caller: Caller
    tokens: int
    deadline: float
    asked: float
    join_key: object = None
    waiting: int = 0
    computed: int = 0
    order: tuple[float, int] = (0.0, 0)


class FakeHosts:
    """They compute one batch after the other, each in `fixed_s + token_s * tokens`; two of a layer are on their way at most.

    Of each caller: milliseconds of the answers in time, and how often it got which end (answered, expired, refused, late, pushed out).
    """

    def __init__(self, layers: int = 1, fixed_s: float = 1e-3, token_s: float = 1e-5, max_batch_tokens: int = 8192) -> None:
        self.now = 0.0
        self.fixed_s, self.token_s = fixed_s, token_s
        self.admission = Admission(262144, lambda tokens: None)
        self.backlog = self.admission.backlog
        self.loads = [self.backlog.add_layer(max_batch_tokens, partial(self._pump, layer), self._push_out) for layer in range(layers)]
        self.ends: Counter[tuple[str, str]] = Counter()
        self.latencies_ms: dict[str, list[float]] = {}
        self.batches: list[list[Turn[FakeRequest]]] = []
        self.then: dict[str, Callable[[str], None]] = {}
        self._free_at = 0.0
        self._on_its_way = [0] * layers
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def run(self, until: float) -> None:
        """Everything that happens before."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def submit(self, caller: str, tokens: int, deadline_s: float = 60.0, layer: int = 0, join_key: object = None) -> None:
        deadline = self.now + deadline_s
        try:
            known = self.admission.admit(self.loads[layer], caller, tokens, deadline, self.now)
        except Overloaded:
            self._end(caller, "refused")
            return
        self.loads[layer].queue.add(FakeRequest(known, tokens, deadline, self.now, join_key), self.loads[layer].request_s(tokens))
        self._pump(layer)

    def keep_asking(self, caller: str, tokens: int, in_flight: int, layer: int = 0) -> None:
        """A closed loop: the next request follows an answer at once, a refusal after 20 ms."""

        def again(end: str) -> None:
            self.at(self.now + (0.02 if end == "refused" else 2e-4), lambda: self.submit(caller, tokens, layer=layer))

        self.then[caller] = again
        for _ in range(in_flight):
            again("")

    def flood(self, caller: str, rate: float, tokens: int, deadline_s: float, until: float, alone: bool = False) -> None:
        """An open loop of `rate` requests a second; `alone`: none of them can be joined with another."""

        def ask() -> None:
            self.submit(caller, tokens, deadline_s, join_key=next(self._numbers) if alone else None)
            if self.now + 1 / rate < until:
                self.at(self.now + 1 / rate, ask)

        self.at(self.now, ask)

    def p50_ms(self, caller: str) -> float:
        return sorted(self.latencies_ms[caller])[len(self.latencies_ms[caller]) // 2]

    def ended(self, end: str) -> int:
        return sum(number for (_, what), number in self.ends.items() if what == end)

    def _pump(self, layer: int) -> None:
        load = self.loads[layer]
        while load.queue and self._on_its_way[layer] < 2:
            if (ready_at := self.backlog.ready_at(load, self.now)) > self.now:
                self.at(ready_at, partial(self._pump, layer))
                break
            turns, late = self.backlog.next_batch(load, self.now)
            for request in late:
                self._drop(request, "late")
            if turns:
                self._send(layer, turns)
            elif not late:
                break

    def _push_out(self, request: FakeRequest, _error: Overloaded) -> None:
        self._drop(request, "pushed out")

    def _drop(self, request: FakeRequest, end: str) -> None:
        self.admission.release(request.caller, request.tokens)
        for load in self.loads:
            load.queue.remove(request)
        self._end(request.caller.key, end)

    def _send(self, layer: int, turns: list[Turn[FakeRequest]]) -> None:
        self.batches.append(turns)
        self._on_its_way[layer] += 1
        flight = self.backlog.begin(self.loads[layer], turns, self.now)
        tokens = sum(turn.tokens for turn in turns)
        self._free_at = max(self.now, self._free_at) + self.fixed_s + self.token_s * tokens

        def end() -> None:
            self._on_its_way[layer] -= 1
            for request, tokens in turns:
                request.computed += tokens
                if request.computed < request.tokens:
                    continue
                self.admission.release(request.caller, request.tokens)
                is_in_time = self.now <= request.deadline
                if is_in_time:
                    self.latencies_ms.setdefault(request.caller.key, []).append(1e3 * (self.now - request.asked))
                self._end(request.caller.key, "answered" if is_in_time else "expired")
            self.backlog.end(flight, self.now, is_answered=True)

        self.at(self._free_at, end)

    def _end(self, caller: str, end: str) -> None:
        self.ends[caller, end] += 1
        if caller in self.then:
            self.then[caller](end)
