"""Desired state -> actions: which hosts run where, and what they serve. No Ray, no gRPC; not on the path of a request."""

from moeserve.control.assignments import Assigned, Assignment, Node, Wanted
from moeserve.control.controller import Controller
from moeserve.control.desired import Planner
from moeserve.control.first_state import first_state
from moeserve.control.follower import CannotFollow, Follower
from moeserve.control.following import Following
from moeserve.control.frontends import Frontends
from moeserve.control.orders import Orders, OrderStream
from moeserve.control.reconcile import reconcile
from moeserve.control.saved import Saved
from moeserve.control.state import NumHosts, State

__all__ = [
    "Assigned",
    "Assignment",
    "CannotFollow",
    "Controller",
    "Follower",
    "Following",
    "Frontends",
    "Node",
    "NumHosts",
    "OrderStream",
    "Orders",
    "Planner",
    "Saved",
    "State",
    "Wanted",
    "first_state",
    "reconcile",
]
