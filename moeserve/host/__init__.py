"""The host's loop without Ray: receive, pass on, merge, one grouped pass, answer."""

from moeserve.host.holdings import Holdings
from moeserve.host.loop import HostLoop
from moeserve.host.relay import Relay
from moeserve.host.shelf import Shelf

__all__ = ["Holdings", "HostLoop", "Relay", "Shelf"]
