"""What is asked of hosts for one batch, and what comes back.

R rows of a message, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch

from moeserve.errors import MoEServeError
from moeserve.layer.dispatch import HostWork
from moeserve.transport import PartialFuture

if TYPE_CHECKING:
    from moeserve.frontend.routed import Part


class ParcelState(Enum):
    """What has become of a parcel."""

    PENDING = auto()
    ANSWERED = auto()
    LOST = auto()
    GIVEN_UP = auto()


class Sent(NamedTuple):
    """A message under way: rows [R] int64 of its part, for `works`, to the `host` of the first one, since `at`, monotonic seconds."""

    host: int
    works: Sequence[HostWork]
    rows: torch.Tensor
    future: PartialFuture
    at: float


@dataclass(eq=False)
class Way:
    """Messages that together would answer a parcel."""

    sent: Sequence[Sent]
    is_lost: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all of them were answered."""
        return not self.is_lost and all(sent.future.done() for sent in self.sent)

    def cancel(self) -> None:
        """Tells the hosts that nobody waits for them any longer."""
        for sent in self.sent:
            sent.future.cancel()


class Answer(NamedTuple):
    """What a host has answered to `works`, of a parcel or of a part of it: rows [R] int64 of the part, partial [R, H] float32.

    is_final: nobody else can be asked, so it counts whatever it says.
    """

    parcel: Parcel
    host: int
    works: Sequence[HostWork]
    rows: torch.Tensor
    partial: torch.Tensor
    is_final: bool = False


@dataclass(eq=False)
class Suspicion:
    """Of a host that has answered, of a part, with sums that are not finite.

    confirmed   how often others have answered the same, or a part of it, with finite ones
    is_cleared  nobody says otherwise of some of it: it is the rows that are to blame
    """

    host: int
    part: Part
    confirmed: int = 0
    is_cleared: bool = False


@dataclass(eq=False)
class Parcel:
    """Pairs of a part that travel together; only the `Delivery` writes to it.

    works    the first is of the host that they are sent to, which passes on the others
    ways     each would answer all of it: the first one that is whole counts
    since    monotonic seconds: when it was sent last, or lost
    erred    hosts that have answered these pairs with an error, or with sums that are not finite, or had no room for them
    suspects those of them that may be to blame for sums that are not finite
    error    what the host answered instead of sums, or that it had no room for the rows
    behind   what it answered if it has nothing of the epoch
    refused  sums that are not finite, for when nobody else can be asked
    is_must  requests that can be answered without it have been; it is given up only if all of these can be
    """

    part: Part
    works: Sequence[HostWork]
    since: float
    state: ParcelState = ParcelState.PENDING
    ways: list[Way] = field(default_factory=list)
    erred: frozenset[int] = frozenset()
    suspects: frozenset[Suspicion] = frozenset()
    error: MoEServeError | None = None
    behind: str = ""
    refused: list[Answer] = field(default_factory=list)
    is_must: bool = False
    has_hedge_won: bool = False

    @property
    def host(self) -> int:
        """Where it is sent first."""
        return self.works[0].host

    @property
    def num_rows(self) -> int:
        """Rows of all its works."""
        return sum(work.rows.numel() for work in self.works)
