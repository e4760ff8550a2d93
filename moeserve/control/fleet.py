"""All hosts, as a controller needs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from moeserve.control.rollout import Hosts
from moeserve.observe.stats import HostInfo, PassTime


class HostFleet(Hosts, Protocol):
    """All hosts."""

    @property
    def given_up(self) -> Collection[int]:
        """Hosts that will not be restarted."""
        ...

    @property
    def failing(self) -> Mapping[int, str]:
        """Hosts that are down and not restarting, and why."""
        ...

    @property
    def present(self) -> Mapping[int, HostInfo]:
        """The hosts that are up, as they describe themselves."""
        ...

    @property
    def pass_times(self) -> Mapping[int, PassTime]:
        """How busy hosts have been, as each said last."""
        ...
