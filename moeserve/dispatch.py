"""From routing to messages and back: one stable sort, then slices.

T tokens, K choices per token, P kept (token, choice) pairs, R rows sent to one host, N pairs of one host, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from moeserve.placement import LayerPlacement

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HostWork:
    """What one host is asked to do for one batch.

    rows      [R] int64, ascending: the tokens it receives, each once however many of their experts live there
    row_index [N] int64: which of those rows a pair reads
    slots     [N] int32, ascending: which of the host's experts a pair goes to
    weights   [N] float32: the gate's weight of the pair
    """

    host: int
    rows: torch.Tensor
    row_index: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


def plan(topk_ids: torch.Tensor, topk_weights: torch.Tensor, kept: torch.Tensor, placement: LayerPlacement) -> list[HostWork]:
    """Split a routed batch by host: busy hosts only, in the order of their numbers.

    topk_ids [T, K] int64, topk_weights [T, K] float32, kept [T, K] bool (false = dropped or not routed at all), all on the CPU.
    Pairs of one expert keep the order of their tokens.
    """
    # NumPy: a call costs a third of what torch's does, and there are some twenty of them, however few the tokens.
    num_tokens, top_k = topk_ids.shape
    pairs = np.flatnonzero(kept.numpy())
    physical = placement.physical_of_logical[topk_ids.numpy().reshape(-1)[pairs]]
    # Physical experts are numbered host by host, so one stable sort groups pairs by host and, within it, by expert.
    order = physical.argsort(kind="stable")
    pairs, physical = pairs[order], physical[order]
    tokens, slots, weights = pairs // top_k, placement.slot_of_physical[physical], topk_weights.numpy().reshape(-1)[pairs]
    ends = np.searchsorted(placement.host_of_physical[physical], np.arange(placement.num_hosts + 1)).tolist()
    return [
        _host_work(host, num_tokens, tokens[start:end], slots[start:end], weights[start:end])
        for host, (start, end) in enumerate(pairwise(ends))
        if start < end
    ]


def _host_work(host: int, num_tokens: int, tokens: Integers, slots: Integers, weights: Floats) -> HostWork:
    """The pairs of one host; each of their tokens becomes one row."""
    sent = np.zeros(num_tokens, dtype=np.bool_)
    sent[tokens] = True
    row_index = (sent.cumsum() - 1)[tokens]
    rows = np.flatnonzero(sent)
    return HostWork(host, *map(torch.from_numpy, (rows, row_index, slots, weights)))


def permute(hidden_states: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The given rows of [T, H], into `out` [R, H] of the same dtype if given; no copy when all rows are wanted and no `out` is."""
    if out is None and len(rows) == len(hidden_states):
        return hidden_states
    return torch.index_select(hidden_states, 0, rows, out=out)


def combine(answers: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int, hidden_size: int) -> torch.Tensor:
    """Add the hosts' partial rows in float32, in the order given, so the sum does not depend on who answered first.

    answers: (rows [R] int64, partial [R, H] float32) per host. Returns [T, H] float32; zeros where nothing was computed.
    """
    if len(answers) == 1 and len(answers[0][0]) == num_tokens:
        return answers[0][1].clone()
    total = torch.zeros(num_tokens, hidden_size)
    for rows, partial in answers:
        total.index_add_(0, rows, partial)
    return total
