"""What would happen on a cluster that is not there: the planner and the rounds of balancing that ship, on imagined hosts and loads."""

from moeserve.simulate.calls import Calls, Workload, simulated_calls
from moeserve.simulate.cluster import SimulatedCluster
from moeserve.simulate.forecast import Forecast, WhatIf, calls_on, experts_without_copy, simulated
from moeserve.simulate.loads import load_of, possible, read_load
from moeserve.simulate.play import Played, after_loss, balanced, changed, played

__all__ = [
    "Calls",
    "Forecast",
    "Played",
    "SimulatedCluster",
    "WhatIf",
    "Workload",
    "after_loss",
    "balanced",
    "calls_on",
    "changed",
    "experts_without_copy",
    "load_of",
    "played",
    "possible",
    "read_load",
    "simulated",
    "simulated_calls",
]
