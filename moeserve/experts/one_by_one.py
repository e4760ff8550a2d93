"""Experts that are computed by themselves, on any device.

R rows, N (row, expert) pairs, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moeserve.experts.held import Alone
from moeserve.experts.pairs import Pairs

# For every number of rows that it has not seen, oneDNN compiles kernels: a millisecond or more and half a megabyte, for ever. So many rows
# are multiplied as they are; more are filled up to the next sixteenth of a power of two: 79 numbers up to 16384, for 5 % more work.
_EXACT_ROWS = 16


class OneByOne:
    """Every busy expert once, its rows together; deterministic: one row at a time."""

    def __init__(self, held: Sequence[Alone], dtype: torch.dtype, deterministic: bool) -> None:
        self.held = held
        self._dtype = dtype
        self._deterministic = deterministic

    def run(self, hidden_states: torch.Tensor, pairs: Pairs, out: torch.Tensor, adds: bool) -> None:
        """As `PackedExperts.run`."""
        if not adds:
            out.zero_()
        busy = [(each.held, count) for each, count in zip(self.held, pairs.tokens_per_expert.tolist(), strict=True) if count]
        sizes = [count for _, count in busy]
        scales_in = [None] * len(busy) if pairs.input_weights is None else pairs.input_weights[:, None].to(self._dtype).split(sizes)
        parts = zip(busy, pairs.row_index.split(sizes), scales_in, pairs.weights[:, None].split(sizes), strict=True)
        for (expert, count), index, scale_in, scale in parts:
            rows = hidden_states if count == len(hidden_states) == 1 else self._gathered(hidden_states, index)
            rows = rows if scale_in is None else rows * F.pad(scale_in, (0, 0, 0, len(rows) - count))
            # Kernels add up in another order when there are more rows, so where that must not show there is one at a time.
            answer = torch.cat([expert(row) for row in rows.split(1)]) if self._deterministic else expert(rows)[:count]
            out.index_add_(0, index, answer.mul_(scale))

    def _gathered(self, hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The rows at `index`, and after them rows of zeros where a kernel would be compiled for this number of rows alone."""
        count = len(index)
        if hidden_states.device.type != "cpu" or self._dtype == torch.float32 or self._deterministic or count <= _EXACT_ROWS:
            return hidden_states.index_select(0, index)
        rows = hidden_states.new_empty(_filled_up(count), hidden_states.shape[1])
        torch.index_select(hidden_states, 0, index, out=rows[:count])
        rows[count:].zero_()
        return rows


def _filled_up(count: int) -> int:
    step = max(_EXACT_ROWS, 1 << ((count - 1).bit_length() - 4))
    return -(-count // step) * step
