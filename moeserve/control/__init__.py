"""What shall be served and where, and how to get there from what is: no Ray, no gRPC; off the path of a request."""

from moeserve.control.follower import CannotFollow, Follower
from moeserve.control.frontends import FrontendInfo, Frontends
from moeserve.control.rollout import Rollout
from moeserve.control.seats import Node, Seat, Seating, Wanted

__all__ = ["CannotFollow", "Follower", "FrontendInfo", "Frontends", "Node", "Rollout", "Seat", "Seating", "Wanted"]
