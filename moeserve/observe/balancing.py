"""What a controller says of balancing, and the metrics that show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: moved = experts are where the load wants them; unchanged = they were, or a change would not have paid; stopped = a host was down, calls
#: became slower, or another change came between; failed = for any other reason
Outcome = Literal["moved", "unchanged", "stopped", "failed"]
OUTCOMES: Final[Sequence[Outcome]] = get_args(Outcome)


@dataclass(frozen=True)
class Balancing:
    """What a controller has done to balance the hosts, since it started, and what it is doing.

    rounds: how many, by outcome; latest: the latest round in one line
    balancedness: for each layer mean / max of the rows expected on its hosts, NaN = not known, empty = of none
    changing: the kind of the change that is being brought in, and how far a round is; "" = nothing
    """

    rounds: Mapping[str, int] = field(default_factory=dict)
    moved_experts: int = 0
    moved_bytes: int = 0
    balancedness: tuple[float, ...] = ()
    latest: str = ""
    changing: str = ""

    def balancedness_of(self, layer: int) -> float | None:
        """None = not known."""
        known = layer < len(self.balancedness) and not math.isnan(self.balancedness[layer])
        return self.balancedness[layer] if known else None


class BalancingMetrics(Collector):
    """Shows what the controller said last. `layers`: their names."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.said = Balancing()
        self._layers = layers

    def collect(self) -> Iterable[Metric]:
        """The same from every frontend of a service."""
        said = self.said
        rounds = CounterMetricFamily("moeserve_rebalances", "Rounds of balancing", labels=["outcome"])
        for outcome in OUTCOMES:
            rounds.add_metric([outcome], said.rounds.get(outcome, 0))
        even = GaugeMetricFamily("moeserve_host_balancedness_ratio", "Mean / max of the rows expected on the hosts", labels=["layer"])
        for layer, ratio in zip(self._layers, said.balancedness, strict=False):
            if not math.isnan(ratio):
                even.add_metric([layer], ratio)
        return [
            rounds,
            CounterMetricFamily("moeserve_moved_experts", "Experts that were moved or copied to balance the hosts", said.moved_experts),
            CounterMetricFamily("moeserve_moved_bytes", "Bytes that hosts read for that", said.moved_bytes),
            even,
        ]
