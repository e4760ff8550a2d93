"""The metric that shows how busy hosts are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moeserve.observe.stats import host_name


class BusyMetrics(Collector):
    """Shows what the controller said last: the share of each host by its number. A host that the controller does not hear has none."""

    def __init__(self) -> None:
        self.said: Mapping[int, float] = {}

    def collect(self) -> Iterable[Metric]:
        """The same from every frontend of a service."""
        busy = GaugeMetricFamily("moeserve_host_busy_ratio", "Time that the host spends in passes / time, lately", labels=["host"])
        for number, share in self.said.items():
            busy.add_metric([host_name(number)], share)
        return [busy]
