"""The host's loop without Ray: receive, pass on, merge, one grouped pass, answer."""

from moeserve.host.loop import HostLoop
from moeserve.host.relay import Relay

__all__ = ["HostLoop", "Relay"]
