"""An expert in the memory of a host: the unit that banks share, in the form that its device computes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from moeserve.experts.expert import Expert


class HeldExpert(Protocol):
    """One expert, or one shard of it, where it is computed. Any number of banks may have it."""

    @property
    def kind(self) -> Hashable | None:
        """Neighbors of one kind are computed together; None = by itself."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, without what its form adds."""
        ...

    def expert(self) -> Expert:
        """The expert in the usual order; a copy where its form is another."""
        ...


@dataclass(frozen=True, eq=False)
class Alone:
    """An expert that is computed by itself, on its device."""

    held: Expert

    @property
    def kind(self) -> None:
        """None."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.held.nbytes

    def expert(self) -> Expert:
        """The expert itself."""
        return self.held
