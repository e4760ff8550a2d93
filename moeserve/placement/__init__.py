"""Placement of physical experts on hosts, and the choice of copies: pure functions; no clock, no I/O."""

from moeserve.placement.bounds import fewest_hosts, most_hosts
from moeserve.placement.copies import choose_copies
from moeserve.placement.layer import LayerPlacement, Placement
from moeserve.placement.plan import plan_placement

__all__ = ["LayerPlacement", "Placement", "choose_copies", "fewest_hosts", "most_hosts", "plan_placement"]
