"""One batch from end to end: admission, batching, the forward pass, and dead hosts."""

from moeserve.frontend.frontend import Frontend
from moeserve.frontend.link import HostLink
from moeserve.frontend.settings import FrontendSettings, HostAccess

__all__ = ["Frontend", "FrontendSettings", "HostAccess", "HostLink"]
