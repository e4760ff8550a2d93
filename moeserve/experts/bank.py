"""One grouped pass over the experts one host holds of one layer: gather, compute, weigh and sum.

R rows received, N (row, expert) pairs, H hidden size, E experts held here (a *local expert* is an index among them).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import length_hint

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from moeserve.config import Kernel
from moeserve.experts.choice import chosen
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.packable import packable
from moeserve.experts.packed import PackedExperts
from moeserve.experts.ragged import Stack, can_stack
from moeserve.kernels import WeightArena, arena_bytes

_CPU = torch.device("cpu")
# For every number of rows that it has not seen, oneDNN compiles kernels: a millisecond or more and half a megabyte, for ever. So many rows
# are multiplied as they are; more are filled up to the next sixteenth of a power of two: 79 numbers up to 16384, for 5 % more work.
_EXACT_ROWS = 16


class ExpertBank:
    """Experts (or shards) ready to run on one device; the layer's shared expert, if there is one, is the last.

    Those of one kind that stand first are computed together, in one call, where there is such a call for them; the others one by one.
    """

    def __init__(
        self,
        experts: Iterable[Expert],
        hidden_size: int,
        dtype: torch.dtype,
        *,
        shared: Expert | None = None,
        device: torch.device = _CPU,
        scale_inputs: bool = False,
        kernel: Kernel = "auto",
        deterministic: bool = False,
    ) -> None:
        """Takes the experts one after the other.

        experts: all of them, or an iterable that loads one after the other: no more than one is in memory beside what is held.
        dtype: of the rows, unless an expert knows better. scale_inputs: weights multiply what goes into an expert instead of what comes
        out (Llama 4); that of the shared expert always multiplies what comes out. kernel: what computes feed-forward experts on the CPU.
        deterministic: the answer to a row is bitwise the same whatever other rows there are.

        Raises ConfigError when `kernel` cannot run here.
        """
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self._deterministic = deterministic
        self._together: PackedExperts | Stack | None = None
        self._others: list[Expert] = []
        self._arena: WeightArena | None = None
        self.nbytes = 0
        self._room_for = length_hint(experts) + (shared is not None)
        if device.type == "cuda" and can_stack(experts := list(experts)):
            self._together, self.nbytes = Stack(experts, device), sum(expert.nbytes for expert in experts)
            experts = ()
        for expert in experts:
            self._take(expert, kernel)
            del expert  # before the next is loaded
        if shared is not None:
            self._take(shared, kernel)
        self._weighs_inputs = np.full(self.num_experts, scale_inputs)
        self._weighs_inputs[self.num_experts - (shared is not None) :] = False

    @property
    def num_experts(self) -> int:
        """How many it holds, the shared one among them."""
        return self._num_together + len(self._others)

    @property
    def kernel(self) -> str | None:
        """What computes those that are computed together; None = torch's operators."""
        return self._together.kernel if isinstance(self._together, PackedExperts) else None

    @property
    def experts(self) -> list[Expert]:
        """All of them; of those that are computed together, copies."""
        together = [] if self._together is None else [self._together.expert(index) for index in range(self._num_together)]
        return [*together, *self._others]

    def replaced(self, changes: Mapping[int, Expert]) -> ExpertBank:
        """A bank with other experts at the indices of `changes`; it shares the rest with this one.

        Raises ConfigError when an expert is of another kind than those it is computed with.
        """
        twin, first = copy.copy(self), self._num_together
        if self._together is not None:
            twin._together = self._together.replaced({index: expert for index, expert in changes.items() if index < first})
        others = enumerate(self._others, start=first)
        twin._others = [changes[index].to(self.device) if index in changes else expert for index, expert in others]
        return twin

    @torch.inference_mode()
    def run(
        self, hidden_states: torch.Tensor, row_index: torch.Tensor, local_experts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write to `out` the weighted sum of the experts' answers for every row.

        hidden_states [R, H] any float dtype   rows, each once however many of its experts live here
        row_index     [N]    int               which row each pair reads
        local_experts [N]    int, ascending    which expert it goes to
        weights       [N]    float32           gate weight of the pair
        out           [R, H] float32           overwritten; sums run in float32 in the order of the local experts
        """
        hidden_states = hidden_states.to(self.device, self.dtype)
        # Counted by NumPy: a third of the time of a torch call, and the numbers are needed here, not on the device.
        counts = np.bincount(local_experts.numpy(force=True), minlength=self.num_experts)
        total = out if out.device == self.device and out.is_contiguous() else torch.empty(out.shape, device=self.device)
        row_index, weights, first = row_index.to(self.device, torch.int64), weights.to(self.device), self._num_together
        pairs = int(counts[:first].sum())
        if self._together is None:
            total.zero_()
        else:
            weighed = self._weighed(counts[:first], weights[:pairs])
            self._together.run(hidden_states, row_index[:pairs], counts[:first], *weighed, total)
        self._one_by_one(hidden_states, row_index[pairs:], counts[first:].tolist(), weights[pairs:, None], total)
        if total is not out:
            out.copy_(total)

    @property
    def _num_together(self) -> int:
        return 0 if self._together is None else self._together.num_experts

    def _take(self, expert: Expert, kernel: Kernel) -> None:
        self.nbytes += expert.nbytes
        whole = packable(expert) if self.device.type == "cpu" else None
        if whole is not None:
            choice = chosen(whole, kernel, self._deterministic)
            if self._together is None and not self._others and choice.kernel is not None:
                self._together = PackedExperts(choice.kernel, self._room_for)
            if isinstance(self._together, PackedExperts) and not self._others and self._together.takes(whole):
                self._together.add(whole)
                return
            expert = self._placed(replace(expert, forms=choice.forms)) if isinstance(expert, FeedForward) else expert
        self._others.append(expert.to(self.device))

    def _placed(self, expert: FeedForward) -> FeedForward:
        """In one mapping with the others."""
        size = arena_bytes(expert.tensors.values())
        if self._arena is None or self._arena.room < size:
            self._arena = WeightArena(size * max(1, self._room_for - self.num_experts))
        return expert.placed(self._arena)

    def _weighed(self, counts: npt.NDArray[np.int64], weights: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights of what goes into those that are computed together, None = all are 1, and of what comes out."""
        weighs_inputs = self._weighs_inputs[: len(counts)]
        if not weighs_inputs.any():
            return None, weights
        is_input = torch.from_numpy(np.repeat(weighs_inputs, counts)).to(self.device)
        return torch.where(is_input, self._rounded(weights), 1), torch.where(is_input, 1, weights)

    def _one_by_one(
        self, hidden_states: torch.Tensor, row_index: torch.Tensor, counts: Sequence[int], weights: torch.Tensor, total: torch.Tensor
    ) -> None:
        """Every busy expert once, its rows together."""
        kinds = zip(self._others, counts, self._weighs_inputs[self._num_together :], strict=True)
        busy = [(expert, count, weighs_inputs) for expert, count, weighs_inputs in kinds if count]
        sizes = [count for _, count, _ in busy]
        for (expert, count, weighs_inputs), index, scale in zip(busy, row_index.split(sizes), weights.split(sizes), strict=True):
            rows = hidden_states if count == len(hidden_states) == 1 else self._gathered(hidden_states, index)
            rows = rows * F.pad(self._rounded(scale).to(self.dtype), (0, 0, 0, len(rows) - count)) if weighs_inputs else rows
            # Kernels add up in another order when there are more rows, so where that must not show there is one at a time.
            answer = torch.cat([expert(row) for row in rows.split(1)]) if self._deterministic else expert(rows)[:count]
            total.index_add_(0, index, answer if weighs_inputs else answer.mul_(scale))

    def _gathered(self, hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The rows at `index`, and after them rows of zeros where a kernel would be compiled for this number of rows alone."""
        count = len(index)
        if self.device.type != "cpu" or self.dtype == torch.float32 or self._deterministic or count <= _EXACT_ROWS:
            return hidden_states.index_select(0, index)
        rows = hidden_states.new_empty(_filled_up(count), hidden_states.shape[1])
        torch.index_select(hidden_states, 0, index, out=rows[:count])
        rows[count:].zero_()
        return rows

    def _rounded(self, weights: torch.Tensor) -> torch.Tensor:
        """As the model does where weights multiply inputs: the weight to the type of the rows first."""
        return weights.to(self.dtype).float()


def _filled_up(count: int) -> int:
    step = max(_EXACT_ROWS, 1 << ((count - 1).bit_length() - 4))
    return -(-count // step) * step
