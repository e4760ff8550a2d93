"""What an expert is to those who run it, and how one is split.

n rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import torch


class Expert(Protocol):
    """One expert, or one shard of it, on one device."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, H] of any float dtype -> a new [n, H] float32."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same expert there."""
        ...


class ExpertShard(NamedTuple):
    """A whole expert (shard 0 of 1), or one of `of` parts along its intermediate dimension, whose answers add up to the whole's.

    Tensor parallelism within an expert (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053).
    """

    expert: int
    shard: int = 0
    of: int = 1

    def span(self, intermediate_size: int) -> slice:
        """Which of the I intermediate channels it has."""
        return slice(intermediate_size * self.shard // self.of, intermediate_size * (self.shard + 1) // self.of)

    @property
    def is_first(self) -> bool:
        """Whether it adds what must be added once, the bias of the second projection; that of the others is zero."""
        return self.shard == 0
