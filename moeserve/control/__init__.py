"""What shall be served and where, and how to get there from what is: no Ray, no gRPC; off the path of a request."""

from moeserve.control.assignments import Assigned, Assignment, Node, Wanted
from moeserve.control.controller import Controller, first_state
from moeserve.control.desired import Planner
from moeserve.control.follower import CannotFollow, Follower
from moeserve.control.frontends import FrontendInfo, Frontends
from moeserve.control.reconcile import reconcile
from moeserve.control.saved import Saved
from moeserve.control.state import NumHosts, State

__all__ = [
    "Assigned",
    "Assignment",
    "CannotFollow",
    "Controller",
    "Follower",
    "FrontendInfo",
    "Frontends",
    "Node",
    "NumHosts",
    "Planner",
    "Saved",
    "State",
    "Wanted",
    "first_state",
    "reconcile",
]
