"""What shall be served and where, and how to get there from what is: no Ray, no gRPC; off the path of a request."""

from moeserve.control.reconcile import reconcile
from moeserve.control.rollout import Rollout
from moeserve.control.seats import Node, Seat, Seating, Wanted
from moeserve.control.wish import wanted_hosts

__all__ = ["Node", "Rollout", "Seat", "Seating", "Wanted", "reconcile", "wanted_hosts"]
