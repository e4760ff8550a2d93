"""Hosts that were lost and are back where they were: their places do not change, but they read everything again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeserve.control.assignments import Assignment
from moeserve.control.audit import AuditLog, Begun
from moeserve.observe.stats import HostInfo
from moeserve.placement import Transition


class Restarts:
    """Records each; how long it took is counted from the look that missed the host."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._known: dict[int, HostInfo] = {}
        self._down: dict[int, Begun] = {}

    def look(self, present: Mapping[int, HostInfo], assignments: Sequence[Assignment]) -> None:
        """The hosts that are up now, of those that should be."""
        numbers = {assignment.number for assignment in assignments}
        self._known = {number: info for number, info in self._known.items() if number in numbers}
        self._down = {number: begun for number, begun in self._down.items() if number in numbers}
        for number in numbers:
            known, info = self._known.get(number), present.get(number)
            if info is None:
                if known is not None:
                    self._down.setdefault(number, _begun(known))
                continue
            begun = self._down.pop(number, None)
            if known is not None and known.endpoints != info.endpoints:
                self._audit.end(begun or _begun(known), Transition(0, 0, info.experts_held, info.weights_bytes, {}))
            self._known[number] = info


def _begun(lost: HostInfo) -> Begun:
    return Begun("restart", f"{lost.name} on {lost.node}", f"{lost.name} was lost")
