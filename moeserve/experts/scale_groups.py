"""Neighbors that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScaleGroups:
    """Neighbors that share a scale: so many, of which the first group has lost `cut` in front."""

    size: int
    cut: int = 0

    @classmethod
    def of(cls, index: torch.Tensor) -> ScaleGroups | None:
        """Those of neighbors whose groups are `index`; None when these are in no such order."""
        if not len(index):
            return cls(1)
        sizes = torch.bincount(index)
        size = int(sizes.max())
        found = cls(size, size - int(sizes[0]) if len(sizes) > 1 else 0)
        return found if torch.equal(found.index(0, len(index)), index) else None

    def count(self, length: int) -> int:
        """ScaleGroups that so many neighbors are in."""
        return -(-(length + self.cut) // self.size)

    def index(self, first: int, last: int) -> torch.Tensor:
        """For each of these neighbors, its group."""
        return torch.div(torch.arange(first + self.cut, last + self.cut), self.size, rounding_mode="floor")

    def are_whole(self, length: int) -> bool:
        """Whether none is cut."""
        return not self.cut and length % self.size == 0
