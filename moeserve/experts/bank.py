"""One grouped pass over the experts one host holds of one layer: gather, compute, weigh and sum.

R rows received, N (row, expert) pairs, H hidden size, E experts held here (their index is the *slot*).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moeserve.experts.expert import Expert
from moeserve.experts.ragged import Stack, can_stack

_CPU = torch.device("cpu")


class ExpertBank:
    """Experts (or shards) ready to run on one device, and after them, in the last slot, the layer's shared expert if there is one.

    dtype: of the rows, unless an expert knows better. scale_inputs: weights multiply what goes into an expert instead of what comes out
    (Llama 4); that of the shared expert always multiplies what comes out.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        hidden_size: int,
        dtype: torch.dtype,
        *,
        shared: Expert | None = None,
        device: torch.device = _CPU,
        scale_inputs: bool = False,
    ) -> None:
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        everyone = [*experts, *([] if shared is None else [shared])]
        self.num_experts = len(everyone)
        self.nbytes = sum(expert.nbytes for expert in everyone)
        self._scale_inputs = [scale_inputs] * len(experts) + [False] * (len(everyone) - len(experts))
        # A stack is one kernel call for all experts; made of the experts one by one, it never holds the weights twice.
        self._stack = Stack(experts, device) if device.type == "cuda" and can_stack(experts) else None
        self.experts: Sequence[Expert] = [expert.to(device) for expert in (everyone[len(experts) :] if self._stack else everyone)]

    def replaced(self, changes: Mapping[int, Expert]) -> ExpertBank:
        """A bank with other experts in the slots of `changes`; it shares the rest with this one."""
        twin = copy.copy(self)
        stacked = self.num_experts - len(self.experts)
        if self._stack is not None:
            twin._stack = self._stack.replaced({slot: expert for slot, expert in changes.items() if slot < stacked})
        experts = enumerate(self.experts, start=stacked)
        twin.experts = [changes[slot].to(self.device) if slot in changes else expert for slot, expert in experts]
        return twin

    @torch.inference_mode()
    def run(
        self, hidden_states: torch.Tensor, row_index: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write to `out` the weighted sum of the experts' answers for every row.

        hidden_states [R, H] any float dtype   rows, each once however many of its experts live here
        row_index     [N]    int               which row each pair reads
        slots         [N]    int, ascending    which expert it goes to
        weights       [N]    float32           gate weight of the pair
        out           [R, H] float32           overwritten; sums run in float32 in the order of the slots
        """
        hidden_states = hidden_states.to(self.device, self.dtype)
        # Counted by NumPy: a third of the time of a torch call, and the numbers are needed here, not on the device.
        tokens_per_expert = np.bincount(slots.numpy(force=True), minlength=self.num_experts).tolist()
        total = torch.zeros_like(out, device=self.device) if self.device.type == "cuda" else out.zero_()
        row_index, weights = row_index.to(self.device), weights.to(self.device)[:, None]
        done = len(tokens_per_expert) - len(self.experts)
        if self._stack is not None:
            pairs = sum(tokens_per_expert[:done])
            self._ragged(self._stack, hidden_states, row_index[:pairs], tokens_per_expert[:done], weights[:pairs], total)
            row_index, weights = row_index[pairs:], weights[pairs:]
        self._one_by_one(hidden_states, row_index, tokens_per_expert[done:], weights, total)
        if total is not out:
            out.copy_(total)

    def _one_by_one(
        self, hidden_states: torch.Tensor, row_index: torch.Tensor, counts: Sequence[int], weights: torch.Tensor, total: torch.Tensor
    ) -> None:
        """Every busy expert once, its rows together: what CPU kernels and caches like best, and any kind of expert."""
        kinds = zip(self.experts, counts, self._scale_inputs[-len(counts) :], strict=True) if counts else ()
        busy = [(expert, count, scale_inputs) for expert, count, scale_inputs in kinds if count]
        sizes = [count for _, count, _ in busy]
        for (expert, count, scale_inputs), index, scale in zip(busy, row_index.split(sizes), weights.split(sizes), strict=True):
            rows = hidden_states if count == len(hidden_states) == 1 else hidden_states.index_select(0, index)
            answer = expert(self._scaled(rows, scale)) if scale_inputs else expert(rows).mul_(scale)
            total.index_add_(0, index, answer)

    def _ragged(
        self,
        stack: Stack,
        hidden_states: torch.Tensor,
        row_index: torch.Tensor,
        counts: Sequence[int],
        weights: torch.Tensor,
        total: torch.Tensor,
    ) -> None:
        rows = hidden_states.index_select(0, row_index)
        answer = stack(self._scaled(rows, weights), counts) if self._scale_inputs[0] else stack(rows, counts).mul_(weights)
        total.index_add_(0, row_index, answer)

    def _scaled(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # Rounded as the model does: the weight to the dtype of the rows first.
        return rows * scale.to(self.dtype)
