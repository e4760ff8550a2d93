"""What shall be served and where, and how to get there from what is: no Ray, no gRPC; off the path of a request."""

from moeserve.control.controller import Controller, first_state
from moeserve.control.frontends import FrontendInfo, Frontends
from moeserve.control.reconcile import reconcile
from moeserve.control.saved import Saved
from moeserve.control.seats import Node, Seat, Seating, Wanted
from moeserve.control.state import NumHosts, State

__all__ = [
    "Controller",
    "FrontendInfo",
    "Frontends",
    "Node",
    "NumHosts",
    "Saved",
    "Seat",
    "Seating",
    "State",
    "Wanted",
    "first_state",
    "reconcile",
]
