"""What a controller must not forget, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moeserve.control.assignments import Assignment
from moeserve.release import Release

NumHosts: TypeAlias = int | Literal["all"]


@dataclass(frozen=True)
class State:
    """`release` and `assignments` are what frontends use; `num_hosts` what was asked for last.

    Epochs up to `last_epoch` and host numbers below `next_number` have been given out, if only to something that was then withdrawn.
    """

    release: Release
    assignments: tuple[Assignment, ...]
    num_hosts: NumHosts
    last_epoch: int
    next_number: int
