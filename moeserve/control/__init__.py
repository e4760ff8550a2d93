"""Desired state -> actions: which hosts run where, and what they serve. No Ray, no gRPC; not on the path of a request.

What plans is imported from here; the parts of a running service are imported from their modules, so that a plan loads none of them.
"""

from moeserve.control.assignments import Assigned, Assignment, Node, Wanted
from moeserve.control.desired import Planner
from moeserve.control.reconcile import reconcile
from moeserve.control.state import NumHosts, State

__all__ = [
    "Assigned",
    "Assignment",
    "Node",
    "NumHosts",
    "Planner",
    "State",
    "Wanted",
    "reconcile",
]
