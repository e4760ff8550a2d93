"""One text of metrics for several processes that share a port: what each counts is added up."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import urlencode

from prometheus_client.utils import floatToGoString

from moeserve.observe.page.exposition import Exposition

log = logging.getLogger(__name__)

#: of the other process, on this machine
_TIMEOUT_S: Final = 2.0
_COUNTED_KINDS: Final = ("counter", "histogram", "summary")
#: gauges of what each process has now; what the others say of hosts and placement, all of them know
_ADDED_GAUGES: Final = ("moeserve_queue_tokens", "moeserve_queue_bytes", "moeserve_host_queue_tokens")
#: counters of what hosts and the controller do, which each process sees in full
_SEEN_BY_ALL: Final = (
    "moeserve_host_restarts",
    "moeserve_expert_uses",
    "moeserve_expert_loads",
    "moeserve_rebalances",
    "moeserve_moved_experts",
    "moeserve_moved_bytes",
)

#: name of a process -> host:port of its metrics
Targets = Callable[[], Mapping[str, str]]
#: name of a family -> its header, and its series with their values
_Families = dict[str, tuple[list[str], dict[str, float]]]


class OtherProcesses:
    """Reads their metrics. What a process has counted that does not answer, or has ended, stays."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        #: by name of the process: its target, and what it has counted
        self._last: dict[str, tuple[str, dict[str, float]]] = {}
        #: what those have counted that were there before
        self._ended: dict[str, float] = {}

    def add_to(self, own: Exposition, accept: str, names: list[str]) -> Exposition:
        """`own` with what the others count, asked in the same way."""
        families = _parse(own.body)
        for process, target in self._targets().items():
            counted = self._counted(process, target)
            theirs = _parse(self._ask(target, accept, names))
            for name, (header, series) in theirs.items():
                ours = families.setdefault(name, (header, {}))[1]
                if _is_counted(name, header):
                    counted.update(series)
                    ours.update({one: value if _is_time(one) else 0.0 for one, value in series.items() if one not in ours})
                elif name in _ADDED_GAUGES:
                    ours.update({one: ours.get(one, 0.0) + value for one, value in series.items()})
                else:
                    ours.update({one: value for one, value in series.items() if one not in ours})
        for name, (header, series) in families.items():
            if _is_counted(name, header):
                for counted in (self._ended, *(each for _, each in self._last.values())):
                    for one in series.keys() & counted.keys():
                        if not _is_time(one):
                            series[one] += counted[one]
        end = b"# EOF\n" if own.body.endswith(b"# EOF\n") else b""
        return Exposition(own.content_type, "".join(_lines(families)).encode() + end)

    def _counted(self, process: str, target: str) -> dict[str, float]:
        """What the process has counted, to be updated; one at another address has been started again, and counts from 0."""
        where, counted = self._last.get(process, (target, {}))
        if where != target:
            self._ended.update({one: self._ended.get(one, 0.0) + value for one, value in counted.items()})
            counted = {}
        self._last[process] = target, counted
        return counted

    def _ask(self, target: str, accept: str, names: list[str]) -> bytes:
        connection = http.client.HTTPConnection(target, timeout=_TIMEOUT_S)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/metrics?" + urlencode([("name[]", name) for name in names]), headers={"Accept": accept})
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            if answer.status == http.client.OK:
                return body
        connection.close()
        log.debug("no metrics from %s", target)
        return b""


def _is_time(series: str) -> bool:
    """When something was counted first."""
    return series.partition("{")[0].endswith("_created")


def _is_counted(name: str, header: list[str]) -> bool:
    if name.removesuffix("_total") in _SEEN_BY_ALL:  # OpenMetrics names a family without it
        return False
    return next((line.split()[3] for line in header if line.startswith("# TYPE")), "") in _COUNTED_KINDS


def _parse(body: bytes) -> _Families:
    families: _Families = {}
    header: list[str] = []
    series: dict[str, float] = {}
    for line in body.decode().removesuffix("\n").split("\n"):
        if line.startswith("# HELP"):
            header, series = [line], {}
            families[line.split()[2]] = header, series
        elif line.startswith("#"):
            header.append(line)
        elif line:
            name, _, value = line.rpartition(" ")
            series[name] = float(value)
    families.pop("", None)
    return families


def _lines(families: _Families) -> Iterator[str]:
    for header, series in families.values():
        yield from (f"{line}\n" for line in header if line != "# EOF")
        yield from (f"{name} {_written(value)}\n" for name, value in series.items())


def _written(value: float) -> str:
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return text
