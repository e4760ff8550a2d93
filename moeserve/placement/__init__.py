"""Placement of physical experts on hosts, and the choice of copies: pure functions; no clock, no I/O."""

from moeserve.placement.balance import balancedness, host_rows, layer_balancedness, mean_balancedness
from moeserve.placement.bounds import fewest_hosts, most_hosts
from moeserve.placement.constraints import Constraints, HostLimits, LayerSize, constraints_of
from moeserve.placement.copies import choose_copies
from moeserve.placement.deal import plan_placement
from moeserve.placement.layer import LayerPlacement, Placement
from moeserve.placement.planner import plan
from moeserve.placement.slots import deal_evenly, fill_slots
from moeserve.placement.steps import Memory, steps, without_surplus
from moeserve.placement.transition import Transition, peak_bytes, read_bytes, step_bytes, transition

__all__ = [
    "Constraints",
    "HostLimits",
    "LayerPlacement",
    "LayerSize",
    "Memory",
    "Placement",
    "Transition",
    "balancedness",
    "choose_copies",
    "constraints_of",
    "deal_evenly",
    "fewest_hosts",
    "fill_slots",
    "host_rows",
    "layer_balancedness",
    "mean_balancedness",
    "most_hosts",
    "peak_bytes",
    "plan",
    "plan_placement",
    "read_bytes",
    "step_bytes",
    "steps",
    "transition",
    "without_surplus",
]
