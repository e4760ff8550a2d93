"""The host's loop without Ray: receive, merge, one grouped pass, answer."""

from moeserve.host.loop import HostLoop

__all__ = ["HostLoop"]
