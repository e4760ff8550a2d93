"""The metrics port: HTTP for browsers and Prometheus, read only."""

from moeserve.observe.page.endpoint import StatusPage
from moeserve.observe.page.others import OtherProcesses

__all__ = ["OtherProcesses", "StatusPage"]
