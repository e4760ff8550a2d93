"""The state that a controller saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moeserve.config import Copies
from moeserve.control.assignments import Assignment
from moeserve.release import Release

NumHosts: TypeAlias = int | Literal["all"]


@dataclass(frozen=True)
class State:
    """`release` and `assignments` are in use by frontends; `num_hosts` is the desired number.

    `copies`: as placement.copies, in its place, set by an administrator; None = none was set.
    Epochs up to `last_epoch` and host numbers below `next_number` have been given out, perhaps to a release that was withdrawn.
    """

    release: Release
    assignments: tuple[Assignment, ...]
    num_hosts: NumHosts
    last_epoch: int
    next_number: int
    copies: Copies | None = None

    @property
    def wanted_hosts(self) -> int:
        """The desired number, where it is "all" that of the hosts there are."""
        return len(self.assignments) if self.num_hosts == "all" else self.num_hosts
