"""What shall be served and where, and how to get there from what is: no Ray, no gRPC; off the path of a request."""

from moeserve.control.controller import Controller, first_state
from moeserve.control.follower import CannotFollow, Follower
from moeserve.control.frontends import FrontendInfo, Frontends
from moeserve.control.reconcile import reconcile
from moeserve.control.saved import Saved
from moeserve.control.seats import Node, Seat, Seating, Wanted
from moeserve.control.state import NumHosts, State
from moeserve.control.wish import first_wish, wanted_hosts

__all__ = [
    "CannotFollow",
    "Controller",
    "Follower",
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
    "first_wish",
    "reconcile",
    "wanted_hosts",
]
