"""A batch is several requests laid end to end; counts and means are taken per request, ranks per capacity group.

T tokens, E experts, K choices per token, S segments (requests, or capacity groups). A cell is one expert of one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class Segments:
    """Consecutive runs of tokens that choose among the same experts.

    sizes in tokens, some may be 0; used_token [T] bool, None = every token is used.
    """

    def __init__(self, sizes: Sequence[int], used_token: Tensor | None, num_experts: int, device: torch.device) -> None:
        self.sizes = tuple(sizes)
        self.used_token = used_token
        self.num_experts = num_experts
        self.num_tokens = sum(sizes)
        self.num_cells = len(self.sizes) * num_experts
        self.device = device

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.int64, device=self.device)

    @cached_property
    def ids(self) -> Tensor:
        """[T] int64: the segment of each token."""
        return torch.repeat_interleave(self._lengths, output_size=self.num_tokens)

    @cached_property
    def with_unused(self) -> Segments:
        """The same tokens, all of them used."""
        return self if self.used_token is None else Segments(self.sizes, None, self.num_experts, self.device)

    def divided(self, sizes: Sequence[int]) -> Segments:
        """The same tokens in other segments."""
        return self if tuple(sizes) == self.sizes else Segments(sizes, self.used_token, self.num_experts, self.device)

    @cached_property
    def used_tokens(self) -> Tensor:
        """[S] int64: how many tokens of each segment are used."""
        if self.used_token is None:
            return self._lengths
        return torch.bincount(self.ids[self.used_token], minlength=len(self.sizes))

    def chosen(self, topk_ids: Tensor) -> Tensor:
        """[T, K] bool: the choices that count, which are those of used tokens."""
        if self.used_token is None:
            return torch.ones_like(topk_ids, dtype=torch.bool)
        return self.used_token[:, None].repeat(1, topk_ids.shape[1])

    def cells(self, topk_ids: Tensor) -> Tensor:
        """[T * K] int64: the cell of each choice, segment * E + expert."""
        if len(self.sizes) == 1:
            return topk_ids.flatten()
        return torch.add(topk_ids, self.ids[:, None], alpha=self.num_experts).flatten()

    def count(self, topk_ids: Tensor, mask: Tensor | None) -> Tensor:
        """[S, E] int64: how many choices fall on each cell, of those where mask [T, K] is true; None = of all."""
        if mask is None and topk_ids.is_cpu and len(self.sizes) == 1:
            # NumPy takes a third of the time of torch, which matters when the tokens are few.
            return torch.from_numpy(np.bincount(topk_ids.numpy().reshape(-1), minlength=self.num_experts)[None])
        if mask is None:
            return torch.bincount(self.cells(topk_ids), minlength=self.num_cells).view(-1, self.num_experts)
        counts = self._lengths.new_zeros(self.num_cells)
        return counts.scatter_add_(0, self.cells(topk_ids), mask.flatten().long()).view(-1, self.num_experts)

    def mean(self, values: Tensor) -> Tensor:
        """[T, N] float32 -> [S, N]: mean over the used tokens of each segment, 0 where there are none."""
        if self.sizes == (1,) and self.used_token is None:
            return values
        return self.sum(values) / self._divisors

    @cached_property
    def _divisors(self) -> Tensor:
        if self.used_token is None:
            return torch.tensor([[max(size, 1)] for size in self.sizes], dtype=torch.float32, device=self._lengths.device)
        return self.used_tokens.clamp(min=1).float()[:, None]

    def sum(self, values: Tensor) -> Tensor:
        """[T, ...] float32 -> [S, ...]: sum over the used tokens of each segment, in token order.

        On a GPU the order, and with it the last bits, may differ from run to run; only the losses are made of such sums.
        """
        if self.used_token is not None:
            values = values[self.used_token]
        if len(self.sizes) == 1:
            return values.sum(dim=0, keepdim=True)
        ids = self.ids if self.used_token is None else self.ids[self.used_token]
        return values.new_zeros(len(self.sizes), *values.shape[1:]).index_add_(0, ids, values)
