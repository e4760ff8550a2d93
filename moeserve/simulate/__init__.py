"""What would happen on a cluster that is not there: the planner and the rounds of balancing that ship, on imagined hosts and loads."""

from moeserve.simulate.calls import Calls, Workload, simulated_calls
from moeserve.simulate.cluster import Cluster
from moeserve.simulate.loads import load_of, read_load
from moeserve.simulate.outcome import Outcome, Question, simulated
from moeserve.simulate.play import Played, after_loss, played

__all__ = [
    "Calls",
    "Cluster",
    "Outcome",
    "Played",
    "Question",
    "Workload",
    "after_loss",
    "load_of",
    "played",
    "read_load",
    "simulated",
    "simulated_calls",
]
