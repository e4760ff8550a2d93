"""From calls and faults to the figures of `moeserve chaos`."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeserve.bench.chaos_load import RIGHT, WRONG, ClientCall
from moeserve.bench.chaos_schedule import FaultKind

_MS = 1000.0


class Phase(NamedTuple):
    """Monotonic seconds."""

    begin: float
    end: float


class Injected(NamedTuple):
    """A fault, and when it began, in monotonic seconds."""

    kind: FaultKind
    begin: float


@dataclass(frozen=True)
class Findings:
    """kinds: those that were asked for; phases: before the first fault, during, and after the last host was back.

    is_whole: every host is back at the end; longest_lag_s: for how long the machine did not let the clients run.
    """

    calls: Sequence[ClientCall]
    kinds: Sequence[FaultKind]
    faults: Sequence[Injected]
    phases: dict[str, Phase]
    is_whole: bool
    longest_lag_s: float = 0.0

    @property
    def errors(self) -> Counter[str]:
        """Failed calls by status code."""
        return Counter(call.outcome for call in self.calls if call.outcome not in (RIGHT, WRONG))

    @property
    def wrong(self) -> int:
        """Answers that differ from the layer in one process."""
        return sum(call.outcome == WRONG for call in self.calls)

    @property
    def is_well(self) -> bool:
        """No call has failed or got a wrong answer, and every host is back."""
        return self.is_whole and not self.errors and not self.wrong

    def as_json(self) -> dict[str, Any]:
        """longest_stall_ms: the longest call of those a fault fell into, null = there was no such fault."""
        failed = self.errors.total()
        injected, stalls = Counter(fault.kind for fault in self.faults), self._longest_stalls()
        return {
            "sent": len(self.calls),
            "answered": len(self.calls) - failed,
            "failed": failed,
            "wrong": self.wrong,
            "errors": dict(self.errors),
            "faults": {kind: injected[kind] for kind in self.kinds},
            "longest_stall_ms": {kind: stalls.get(kind) for kind in self.kinds},
            "tokens_per_s": {name: self._tokens_per_s(phase) for name, phase in self.phases.items()},
            "p99_ms": {name: self._p99_ms(phase) for name, phase in self.phases.items()},
            "all_hosts_back": self.is_whole,
            "longest_lag_ms": _MS * self.longest_lag_s,
        }

    def _longest_stalls(self) -> dict[FaultKind, float]:
        begins = [fault.begin for fault in self.faults]
        longest: dict[FaultKind, float] = {}
        for call in self.calls:
            fault = _fault_of(call, begins)
            if fault is not None:
                kind = self.faults[fault].kind
                longest[kind] = max(longest.get(kind, 0.0), _MS * (call.end - call.begin))
        return longest

    def _tokens_per_s(self, phase: Phase) -> float:
        """Of right answers."""
        tokens = sum(call.tokens for call in self.calls if call.outcome == RIGHT and phase.begin <= call.end < phase.end)
        return tokens / (phase.end - phase.begin)

    def _p99_ms(self, phase: Phase) -> float | None:
        ordered = sorted(call.end - call.begin for call in self.calls if phase.begin <= call.end < phase.end)
        return _MS * ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else None


def _fault_of(call: ClientCall, begins: Sequence[float]) -> int | None:
    """Each fault's time lasts until the next one begins; the call belongs to the one in whose time most of it was."""
    first, last = max(0, bisect_right(begins, call.begin) - 1), bisect_left(begins, call.end)
    ends = [*begins[1:], math.inf]
    shares = {fault: min(call.end, ends[fault]) - max(call.begin, begins[fault]) for fault in range(first, last)}
    return max(shares, key=shares.__getitem__, default=None)
