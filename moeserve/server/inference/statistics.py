"""Counts and durations of the requests of one layer, as the protocol has them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moeserve.api.request import BatchStart
from moeserve.server.inference.messages import pb


@dataclass
class Total:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: float) -> None:
        """Once more."""
        self.count += 1
        self.ns += max(0, round(ns))

    def message(self) -> pb.StatisticDuration:
        """For a caller."""
        return pb.StatisticDuration(count=self.count, ns=self.ns)


@dataclass
class Stages:
    """When a request came to its stages, in nanoseconds of the monotonic clock. `batch`: when and with whom its batch began."""

    received: int = field(default_factory=time.monotonic_ns)
    decoded: int = 0
    computed: int = 0
    batch: BatchStart = field(default_factory=BatchStart)


class LayerStatistics:
    """Of one layer; they only grow."""

    def __init__(self) -> None:
        self._last_inference_ms = 0
        self._executions = 0
        self._totals = {name: Total() for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")}

    @contextmanager
    def request(self) -> Iterator[Stages]:
        """One request, until it is answered or has failed."""
        self._last_inference_ms = time.time_ns() // 10**6
        stages = Stages()
        try:
            yield stages
        except BaseException:
            self._totals["fail"].add(time.monotonic_ns() - stages.received)
            raise
        self._answered(stages, time.monotonic_ns())

    def _answered(self, stages: Stages, now: int) -> None:
        began = max(stages.decoded, round(stages.batch.at_s * 1e9))  # an empty request is in no batch
        durations = {
            "success": now - stages.received,
            "compute_input": stages.decoded - stages.received,
            "queue": began - stages.decoded,
            "compute_infer": stages.computed - began,
            "compute_output": now - stages.computed,
        }
        for name, ns in durations.items():
            self._totals[name].add(ns)
        self._executions += stages.batch.is_first

    def message(self, name: str, version: str) -> pb.ModelStatistics:
        """For a caller."""
        return pb.ModelStatistics(
            name=name,
            version=version,
            last_inference=self._last_inference_ms,
            inference_count=self._totals["success"].count,
            execution_count=self._executions,
            inference_stats=pb.InferStatistics(**{stage: total.message() for stage, total in self._totals.items()}),
        )
