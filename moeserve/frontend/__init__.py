"""One batch end to end: admission, batching, the forward pass, what happens when a host dies."""

from moeserve.frontend.frontend import Frontend
from moeserve.frontend.link import HostLink
from moeserve.frontend.settings import FrontendSettings, HostAccess

__all__ = ["Frontend", "FrontendSettings", "HostAccess", "HostLink"]
