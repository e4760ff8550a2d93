"""What a browser and Prometheus see of a service: one HTTP port, read only."""

from moeserve.observe.page.endpoint import StatusPage

__all__ = ["StatusPage"]
