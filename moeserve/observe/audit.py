"""The audit log, as `moeserve events` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

#: done = it is in force, or nothing had to change; stopped = a round of balancing, or a change in steps, ended early, and what has moved
#: stays; withdrawn = the service was ending
Ending = Literal["done", "stopped", "failed", "withdrawn"]
#: what an administrator asked for is always recorded
ADMINISTRATOR: Final = "administrator"


@dataclass(frozen=True)
class AuditEvent:
    """One change of placement, weights, copies or hosts, once it has ended: recorded by the controller, whoever asked for it.

    number: counts from 1 since the service started; time_unix_s: when it began
    kind: start, scale, drain, swap, copies, balance, hosts (nodes and hosts came or went), restart (of a host where it was)
    what: it did; why: who or what asked for it; outcome: an `Ending`; error: the sentence of one that is not done
    epoch: of the placement in force afterwards
    moves: experts that moved to another host; new: further copies; moved_bytes: read by hosts for that
    """

    number: int
    time_unix_s: float
    duration_s: float
    kind: str
    what: str
    why: str
    outcome: str
    error: str
    epoch: int
    moves: int = 0
    new: int = 0
    moved_bytes: int = 0
