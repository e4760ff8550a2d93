"""Calls on an imagined cluster, one event after the other: how many tokens it answers, and how long callers wait.

Callers keep so many requests in progress, or send them by the clock, as those of `moeserve bench` do. A frontend joins what waits for a
layer into batches, two of a layer at a time, the smaller of which may grow behind the larger; its event loop does one thing at a time. A
host does one pass at a time. Where several of them share the cores of a node, passes wait for a core, and frontends, which are short and
come first, take their time from them.

T tokens of a request, K choices of a token, E experts of a layer, D hosts, P physical experts.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Final

import numpy as np

from moeserve.bench.costs import Costs
from moeserve.bench.trace import Rows
from moeserve.errors import ConfigError
from moeserve.placement import Placement
from moeserve.simulate.cores import Cores
from moeserve.simulate.work import LayerWork

#: as `moeserve.frontend.batcher` has it
_MAX_IN_FLIGHT: Final = 2
#: of a call's cost each way, before and after, falls to the caller and to the frontend
_QUARTER: Final = 0.25
#: calls before the measured ones, as a share of them
_WARM_UP: Final = 0.25
_LEAST_CALLS: Final = 1000
#: calls of each caller, if that is more
_ROUNDS: Final = 10


@dataclass(frozen=True)
class Workload:
    """tokens: T; concurrency: requests in progress at each of `frontends`; max_batch_tokens: [batching].

    rate: instead, requests that all callers together send in a second, at times that do not depend on each other
    """

    tokens: int
    concurrency: int
    frontends: int
    max_batch_tokens: int = 8192
    rate: float | None = None


@dataclass(frozen=True, eq=False)
class Calls:
    """tokens_per_s: of calls to a layer; latencies_s: of each call, in the order of the answers; busy [D]: shares of the time in passes."""

    tokens_per_s: float
    latencies_s: Rows
    busy: Rows

    @property
    def p99_ms(self) -> float:
        """The nearest-rank quantile, in milliseconds."""
        return 1e3 * float(np.quantile(self.latencies_s, 0.99, method="inverted_cdf"))


@dataclass(frozen=True, order=True)
class _Request:
    sent_s: float
    number: int
    frontend: int
    layer: int


@dataclass(frozen=True, eq=False)
class _Flight:
    """A batch on its way: when the hosts are done with it, and how long it takes the frontend before and after that."""

    requests: list[_Request]
    done_s: float
    before_s: float
    after_s: float


@dataclass(frozen=True)
class _Look:
    """A batch that has waited for more requests is due."""

    frontend: int
    layer: int


@dataclass
class _Frontend:
    """loop_s, caller_s: when its event loop, and the process of its callers, are done with what they have begun."""

    loop_s: float = 0.0
    caller_s: float = 0.0
    waiting: dict[int, deque[_Request]] = field(default_factory=dict)
    flights: dict[int, list[_Flight]] = field(default_factory=dict)


def simulated_calls(placement: Placement, work: Sequence[LayerWork], workload: Workload, cores: Cores, costs: Costs, seed: int) -> Calls:
    """`work`: of each layer of the placement. Raises ConfigError where calls cost nothing."""
    return _Simulation(placement, work, workload, cores, costs, np.random.default_rng(seed)).run()


class _Simulation:
    """Events are requests that reach a frontend, batches whose answers are all there or that are due, and None: the next request is due."""

    def __init__(
        self,
        placement: Placement,
        work: Sequence[LayerWork],
        workload: Workload,
        cores: Cores,
        costs: Costs,
        drawn: np.random.Generator,
    ) -> None:
        self._work, self._load, self._cores, self._costs, self._drawn = work, workload, cores, costs, drawn
        self._whole_call_s = costs.call_s.seconds(workload.tokens)
        self._frontends = [_Frontend() for _ in range(workload.frontends)]
        self._host_s = np.zeros(placement.num_hosts)
        self._busy_s = np.zeros(placement.num_hosts)
        #: when, a number that no other has, and what
        self._events: list[tuple[float, int, _Request | _Flight | _Look | None]] = []
        self._number = 0
        #: the frontends that requests by the clock go to, in turn
        self._next_frontend = cycle(range(workload.frontends))
        self._answers: list[tuple[float, float]] = []

    def run(self) -> Calls:
        callers = self._load.concurrency * self._load.frontends
        measured = max(_LEAST_CALLS, _ROUNDS * callers)
        warm_up = int(_WARM_UP * measured)
        for number in range(callers if self._load.rate is None else 0):
            self._send(0.0, number % self._load.frontends, number % len(self._work))
        if self._load.rate is not None:
            self._push(0.0, None)
        while len(self._answers) < warm_up + measured:
            now, _, what = heapq.heappop(self._events)
            if what is None:
                self._send(now, next(self._next_frontend), int(self._drawn.integers(len(self._work))))
                self._push(now + float(self._drawn.exponential(1 / (self._load.rate or 1.0))), None)
            elif isinstance(what, _Request):
                self._arrive(now, what)
            elif isinstance(what, _Look):
                self._begin(now, what.frontend, what.layer)
            else:
                self._finish(now, what)
        began = self._answers[warm_up - 1][0]
        ended, latencies = self._answers[-1][0], np.array([latency for _, latency in self._answers[warm_up:]])
        if ended <= began:
            raise ConfigError("calls take no time by these costs; allowed: costs by which they take some")
        return Calls(measured * self._load.tokens / (ended - began), latencies, self._busy_s / max(ended, float(self._host_s.max())))

    def _call_s(self) -> float:
        return _QUARTER * self._whole_call_s

    def _push(self, at_s: float, what: _Request | _Flight | _Look | None) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, what))

    def _send(self, now: float, frontend: int, layer: int) -> None:
        one = self._frontends[frontend]
        one.caller_s = self._cores.take(frontend, max(now, one.caller_s), self._call_s())
        self._number += 1
        self._push(one.caller_s, _Request(now, self._number, frontend, layer))

    def _arrive(self, now: float, request: _Request) -> None:
        one = self._frontends[request.frontend]
        one.waiting.setdefault(request.layer, deque()).append(request)
        self._begin(now, request.frontend, request.layer)

    def _begin(self, now: float, frontend: int, layer: int) -> None:
        """The next batches of a layer."""
        one = self._frontends[frontend]
        waiting, flights = one.waiting[layer], one.flights.setdefault(layer, [])
        most = max(1, self._load.max_batch_tokens // self._load.tokens)
        while waiting and len(flights) < _MAX_IN_FLIGHT:
            # As `moeserve.frontend.backlog` has it: behind a larger batch a smaller one waits for more requests.
            if flights and len(waiting) < min(most, len(flights[0].requests)) and (due := flights[0].done_s - flights[0].before_s) > now:
                self._push(due, _Look(frontend, layer))
                return
            batch = [waiting.popleft() for _ in range(min(len(waiting), most))]
            flights.append(self._flight(now, batch))
            self._push(flights[-1].done_s, flights[-1])

    def _flight(self, now: float, batch: list[_Request]) -> _Flight:
        """The batch is sent, and computed."""
        frontend, layer = batch[0].frontend, batch[0].layer
        one, tokens, costs = self._frontends[frontend], len(batch) * self._load.tokens, self._costs
        start = max(now, one.loop_s)
        parts = self._work[layer].parts(tokens, np.maximum(self._host_s - start, 0.0), self._drawn)
        before_s = len(batch) * self._call_s() + costs.batch_s.seconds(tokens)
        before_s += costs.hop_s * len(parts.hosts) + costs.sent_row_s * parts.sent_rows
        after_s = costs.summed_row_s * parts.sent_rows + len(batch) * self._call_s()
        by_chance = costs.spread[int(self._drawn.integers(len(costs.spread)))]
        one.loop_s = self._cores.take(frontend, start, by_chance * before_s)
        ends = self._cores.passes(one.loop_s, parts.hosts, by_chance * parts.seconds, self._host_s)
        self._host_s[parts.hosts] = ends
        self._busy_s[parts.hosts] += by_chance * parts.seconds
        return _Flight(batch, float(ends.max()), by_chance * before_s, by_chance * after_s)

    def _finish(self, now: float, flight: _Flight) -> None:
        frontend, layer = flight.requests[0].frontend, flight.requests[0].layer
        one = self._frontends[frontend]
        one.loop_s = self._cores.take(frontend, max(now, one.loop_s), flight.after_s)
        one.flights[layer].remove(flight)
        for request in flight.requests:
            one.caller_s = self._cores.take(frontend, max(one.loop_s, one.caller_s), self._call_s())
            self._answers.append((one.caller_s, one.caller_s - request.sent_s))
            if self._load.rate is None:
                self._send(one.caller_s, frontend, (layer + 1) % len(self._work))
        self._begin(one.loop_s, frontend, layer)
