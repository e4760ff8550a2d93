"""The metrics port: HTTP for browsers and Prometheus, read only."""

from moeserve.observe.page.endpoint import StatusPage

__all__ = ["StatusPage"]
