"""Random numbers that belong to a request: the same request gets the same ones, whatever company it is run in. T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Chance:
    """One generator per request, all started from `seed`; `generator` takes their place when there is a single request."""

    def __init__(self, request_sizes: Sequence[int], device: torch.device, seed: int | None, generator: torch.Generator | None) -> None:
        self._sizes = request_sizes
        self._device = device
        self._seed = seed
        self._generators = None if generator is None else [generator]
        assert generator is None or len(request_sizes) == 1

    def uniform(self, width: int) -> Tensor:
        """[T, width] float32 in [0, 1)."""
        return self._draw(torch.rand, width)

    def normal(self, width: int) -> Tensor:
        """[T, width] float32 of mean 0 and variance 1."""
        return self._draw(torch.randn, width)

    def gumbel(self, width: int) -> Tensor:
        """[T, width] float32, -log(-log(u)): the largest of x + Gumbel is a draw from softmax(x)."""
        float32 = torch.finfo(torch.float32)
        return -(-self.uniform(width).clamp(float32.tiny, 1 - float32.eps).log()).log()

    def _draw(self, draw: Callable[..., Tensor], width: int) -> Tensor:
        # Drawn where the generator lives, so that a GPU sees the numbers a CPU would.
        rows = zip(self._sizes, self._all_generators(), strict=True)
        drawn = [draw(size, width, generator=each, device=each.device, dtype=torch.float32) for size, each in rows]
        return torch.cat(drawn).to(self._device)

    def _all_generators(self) -> list[torch.Generator]:
        if self._generators is None:
            assert self._seed is not None, "checked by GatingConfig"
            self._generators = [torch.Generator().manual_seed(self._seed) for _ in self._sizes]
        return self._generators
