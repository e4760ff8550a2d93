"""A bank of more experts than there is memory for: a pass waits for those that must be read.

N pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch

from moeserve.experts import BankForm, GroupOf, Integers, LayerBank, grouped
from moeserve.host.expert_cache import ExpertCache, Loadable


class SpilledBank(LayerBank):
    """The experts that `wanted` says, in the memory of `cache`. It answers bit by bit as a bank that holds them all."""

    def __init__(self, wanted: Sequence[Loadable], form: BankForm, cache: ExpertCache) -> None:
        super().__init__(len(wanted), form)
        self._wanted, self._cache = wanted, cache
        self._deterministic = form.deterministic

    def claim(self, local_experts: torch.Tensor) -> bool:
        """Whether all of these [N] are in memory, with room for a pass: they stay there until `let_go`."""
        experts = np.unique(local_experts.numpy())
        # One that does not exist is refused, without delay.
        return bool(experts[-1] >= self.num_experts) or self._cache.claim([self._wanted[expert] for expert in experts])

    def let_go(self) -> None:
        """Of all that was claimed."""
        self._cache.let_go()

    def groups(self, counts: Integers) -> Generator[GroupOf]:
        """Of as many experts with pairs as fit into memory together; these stay there while they are computed."""
        for experts in self._portions(np.flatnonzero(counts)):
            with self._cache.held([self._wanted[expert] for expert in experts]) as held:
                first = 0
                for group in grouped(held, self.dtype, self._deterministic):
                    last = first + len(group.held)
                    yield group, experts[first:last]
                    first = last

    def _portions(self, experts: Integers) -> Iterator[Integers]:
        first, nbytes = 0, 0
        for index, expert in enumerate(experts):
            nbytes += self._wanted[expert].nbytes
            if nbytes > self._cache.limit_bytes:
                yield experts[first:index]
                first, nbytes = index, self._wanted[expert].nbytes
        yield experts[first:]
