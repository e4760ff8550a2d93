"""Every Prometheus object, declared once. Counted in the frontend, so counters survive the death of a host."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moeserve.config import LayerSpec
from moeserve.observe.balancing import BalancingMetrics
from moeserve.observe.busy import BusyMetrics
from moeserve.observe.call_times import CallTimes
from moeserve.observe.counted import Counted, add_series, series_of
from moeserve.observe.counted import Metric as Told
from moeserve.observe.expert_counts import ExpertCounts, ExpertDetail
from moeserve.observe.stats import CONDITIONS, CallCount, Condition, Durations, Event

Stage = Literal["queue", "route", "dispatch", "experts", "combine"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = tuple(2**power for power in range(0, 17, 2))
_MAX_EVENTS = 100
_SAME_EVENT_S = 10.0


class HostStates(Collector):
    """Whether each host can be reached and computes as it should, and the events of that changing."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._hosts: dict[str, HostState] = {}

    def labels(self, host: str) -> HostState:
        """Sets the state of one host; the metrics show it from then on."""
        return self._hosts.setdefault(host, HostState(host, self._events))

    def forget(self, host: str) -> None:
        """Forgets a host that was removed."""
        if self._hosts.pop(host, None) is not None:
            self._events.add("host_left", host)

    def collect(self) -> Iterable[Metric]:
        """`moeserve_host_up` and `moeserve_host_state`, of hosts that were reached at least once; what those that spill say of experts."""
        up = GaugeMetricFamily("moeserve_host_up", "1 while the frontend is connected to the host", labels=["host"])
        states = GaugeMetricFamily("moeserve_host_state", "1 for the state that the host is in", labels=["host", "state"])
        for name, host in list(self._hosts.items()):
            if host.is_up is not None:
                up.add_metric([name], host.is_up)
                for condition in CONDITIONS:
                    states.add_metric([name, condition], host.condition == condition)
        return [up, states, *self._loads()]

    def _loads(self) -> Iterable[Metric]:
        uses = CounterMetricFamily("moeserve_expert_uses", "Experts that passes of a host have computed", labels=["host"])
        loads = CounterMetricFamily("moeserve_expert_loads", "Experts that had to be read for that first", labels=["host"])
        for name, host in list(self._hosts.items()):
            if host.loads is not None:
                for family, number in zip((uses, loads), host.loads, strict=True):
                    family.add_metric([name], number)
        return uses, loads


class HostState:
    """The state of one host; None = never connected."""

    def __init__(self, name: str, events: EventLog) -> None:
        self.is_up: bool | None = None
        self.condition: Condition = "down"
        #: experts that its passes have used, and those of them that had to be read; None = all are in memory
        self.loads: tuple[int, int] | None = None
        self._name, self._events = name, events

    def set(self, up: bool, condition: Condition) -> None:
        """The frontend has connected to it, or has lost it; and how it does."""
        if up and self.is_up is None:
            self._events.add("host_up", self._name)
        elif self.is_up is not None and up != self.is_up:
            self._events.add("host_back" if up else "host_lost", self._name)
        if condition != self.condition and condition in ("slow", "out"):
            self._events.add(f"host_{condition}", self._name)
        self.is_up, self.condition = up if up or self.is_up is not None else None, condition


class EventLog:
    """The latest events, the oldest first; a flood of one kind is one event with a count. Calls fail in any thread of a program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)

    def add(self, kind: str, subject: str) -> None:
        """Records an event now, or adds to the count of the same recent event."""
        with self._lock:
            now, count = time.time(), 1
            for event in reversed(self._events):
                if event.time_unix_s < now - _SAME_EVENT_S:
                    break
                if (event.kind, event.subject) == (kind, subject):
                    self._events.remove(event)
                    count += event.count
                    break
            self._events.append(Event(now, kind, subject, count))

    def latest(self) -> list[Event]:
        """The oldest first."""
        with self._lock:
            return list(self._events)


class Metrics:
    """The service's metrics in a registry of their own, so several services can live in one process.

    `detail` says which experts have series of their own; None = all, or the busiest where all would be too many.
    """

    def __init__(self, specs: Sequence[LayerSpec], detail: ExpertDetail | None = None) -> None:
        self.registry = CollectorRegistry()
        self.events = EventLog()
        self._started = time.monotonic()
        self.experts = ExpertCounts(specs, detail)
        self.registry.register(self.experts)
        self.balancing = BalancingMetrics([spec.name for spec in specs])
        self.registry.register(self.balancing)
        self.busy = BusyMetrics()
        self.registry.register(self.busy)
        self.requests = self._counter("moeserve_requests", "Calls answered", "method", "code")
        self.call_times = CallTimes()
        self.request_duration = self._histogram("moeserve_request_duration_seconds", "Duration of a call", _SECONDS, "method")
        self.stage_duration = self._histogram("moeserve_stage_duration_seconds", "Duration of a stage of a batch", _SECONDS, "stage")
        # Bound once: looking a label up costs more than observing it.
        self._calls: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._stages = {stage: self.stage_duration.labels(stage) for stage in get_args(Stage)}
        self.batch_tokens = self._histogram("moeserve_batch_tokens", "Tokens run together", _TOKENS)
        self.queue_tokens = self._gauge("moeserve_queue_tokens", "Tokens admitted and not yet answered")
        self.queue_bytes = self._gauge("moeserve_queue_bytes", "Bytes of messages not yet answered, and of answers not yet taken")
        self.placement_epoch = self._gauge("moeserve_placement_epoch", "Epoch of the placement that new batches use")
        self.host_states = HostStates(self.events)
        self.registry.register(self.host_states)
        self.host_queue_tokens = self._gauge("moeserve_host_queue_tokens", "Rows sent to a host and not yet answered", "host")
        self.hosts_failing = self._gauge("moeserve_hosts_failing", "Hosts that cannot be started again, or could not if they ended")
        self.wanted_hosts = self._gauge("moeserve_wanted_hosts", "Hosts that should run")
        self.hosts_missing = self._gauge("moeserve_hosts_missing", "Hosts that should run and have no room on the nodes")
        self.host_restarts = self._counter("moeserve_host_restarts", "Times a host came back as a new process")
        self.expert_retries = self._counter("moeserve_expert_retries", "Messages sent to a host again", "reason")
        self.non_finite_outputs = self._counter(
            "moeserve_non_finite_outputs", "Requests failed because what experts computed was not finite in their dtype", "layer"
        )
        self.hedges = self._counter("moeserve_hedges", "Late messages sent to a second copy too, by who answered first", "outcome")
        self.partial_answers = self._counter("moeserve_partial_answers", "Requests answered without some of their choices", "policy")
        for policy in ("renormalize", "residual"):
            self.partial_answers.labels(policy)
        self.messages = self._counter("moeserve_messages", "Messages sent to hosts by the frontend", "pattern")
        self.aux_loss = self._gauge("moeserve_aux_loss", "Load-balancing loss of the latest request", "layer")

    @cached_property
    def _told(self) -> dict[str, Told]:
        """Of other frontends, by name: what else metrics say, each frontend says itself, or the hosts do."""
        counted = self.requests, self.request_duration, self.stage_duration, self.batch_tokens, self.expert_retries
        return {one._name: one for one in (*counted, self.non_finite_outputs, self.hedges, self.partial_answers, self.messages)}

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """One gRPC call was answered."""
        requests, durations = self._calls.get((method, code)) or self._bind(method, code)
        requests.inc()
        durations.observe(seconds)
        self.call_times.observe(method, code, seconds)
        if code not in {"OK", "CANCELLED"}:  # a caller that cancels is no failure
            self.events.add("call_failed", f"{method} {code}")

    def _bind(self, method: str, code: str) -> tuple[Counter, Histogram]:
        bound = self._calls[method, code] = self.requests.labels(method, code), self.request_duration.labels(method)
        return bound

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """One stage of one batch took `seconds`."""
        self._stages[stage].observe(seconds)

    def counted(self) -> Counted:
        """All that this frontend has counted, for `add`."""
        series = [one for name, metric in self._told.items() for one in series_of(name, metric)]
        return Counted(dict(series), self.experts.counted())

    def add(self, counted: Counted) -> None:
        """Counts of another frontend, which tells of its demand itself; those of metrics that are not known here are left out."""
        self.experts.add_elsewhere(counted.layers)
        for (name, *labels), values in counted.series.items():
            if (metric := self._told.get(name)) is not None:
                add_series(metric, labels, values)

    def forget_host(self, host: str) -> None:
        """No series of a host that has left for good."""
        self.host_states.forget(host)
        self.host_queue_tokens.remove(host)

    @property
    def uptime_s(self) -> float:
        """Seconds since the service started."""
        return time.monotonic() - self._started

    def calls(self) -> list[CallCount]:
        """By method and status code."""
        return [CallCount(labels["method"], labels["code"], int(count)) for labels, count in _samples(self.requests, "_total")]

    def retries(self) -> int:
        """Messages sent to a host again, for any reason."""
        return int(sum(count for _, count in _samples(self.expert_retries, "_total")))

    def host_queues(self) -> dict[str, int]:
        """Rows sent to each host and not yet answered."""
        return {labels["host"]: int(rows) for labels, rows in _samples(self.host_queue_tokens, "")}

    def request_durations(self) -> list[Durations]:
        """One per gRPC method that was called."""
        return _histograms(self.request_duration, "method")

    def stage_durations(self) -> list[Durations]:
        """One per stage of a batch, in their order."""
        return _histograms(self.stage_duration, "stage")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


def _samples(metric: Counter | Gauge | Histogram, suffix: str) -> list[tuple[dict[str, str], float]]:
    return [(one.labels, one.value) for family in metric.collect() for one in family.samples if one.name.endswith(suffix)]


def _histograms(metric: Histogram, label: str) -> list[Durations]:
    buckets: dict[str, list[tuple[float, int]]] = {}
    for labels, value in _samples(metric, "_bucket"):
        buckets.setdefault(labels[label], []).append((float(labels["le"]), int(value)))
    sums = {labels[label]: value for labels, value in _samples(metric, "_sum")}
    return [
        Durations(name, [bound for bound, _ in found[:-1]], _differences([count for _, count in found]), sums[name])
        for name, found in buckets.items()
    ]


def _differences(cumulative: Sequence[int]) -> list[int]:
    return [count - before for count, before in zip(cumulative, (0, *cumulative), strict=False)]
