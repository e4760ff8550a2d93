"""One grouped pass over the experts one host holds of one layer: gather, compute, weigh and sum.

R rows received, N (row, expert) pairs, H hidden size, E experts held here (a *local expert* is an index among them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from moeserve.config import Kernel
from moeserve.experts.expert import Expert
from moeserve.experts.held import Alone, HeldExpert
from moeserve.experts.one_by_one import OneByOne
from moeserve.experts.packed import PackedExperts
from moeserve.experts.packed_expert import PackedExpert
from moeserve.experts.pairs import Pairs
from moeserve.experts.placer import Placer
from moeserve.experts.ragged import Stack, StackedExpert

_CPU = torch.device("cpu")
_Group = PackedExperts | Stack | OneByOne


class ExpertBank:
    """Experts (or shards) ready to run on one device; the layer's shared expert, if there is one, is the last.

    Neighbors of one kind are computed together, in one call, where there is such a call for them; the others one by one. A bank is no more
    than a list of held experts: any number of banks may have the same ones.
    """

    def __init__(
        self,
        experts: Iterable[Expert | HeldExpert],
        hidden_size: int,
        dtype: torch.dtype,
        *,
        shared: Expert | HeldExpert | None = None,
        device: torch.device = _CPU,
        scale_inputs: bool = False,
        kernel: Kernel = "auto",
        deterministic: bool = False,
    ) -> None:
        """Takes the experts one after the other.

        experts: all of them, or an iterable that loads one after the other, as for `Placer.placed`; those that are held already are
        shared. dtype: of the rows, unless an expert knows better. scale_inputs: weights multiply what goes into an expert instead of what
        comes out (Llama 4); that of the shared expert always multiplies what comes out. kernel, deterministic: as for `Placer`.

        Raises ConfigError when `kernel` cannot run here.
        """
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        placer = Placer(device, kernel, deterministic)
        held = list(placer.placed(experts))
        if shared is not None:
            held += placer.placed([shared], one_by_one=True)
        self._groups = [_group(list(alike), dtype, deterministic) for _, alike in groupby(held, key=lambda each: each.kind)]
        self._weighs_inputs = np.full(self.num_experts, scale_inputs)
        self._weighs_inputs[self.num_experts - (shared is not None) :] = False

    @property
    def held(self) -> list[HeldExpert]:
        """All of them, as this bank has them."""
        return [each for group in self._groups for each in group.held]

    @property
    def num_experts(self) -> int:
        """How many it holds, the shared one among them."""
        return sum(len(group.held) for group in self._groups)

    @property
    def nbytes(self) -> int:
        """Bytes of their weights."""
        return sum(each.nbytes for each in self.held)

    @property
    def kernel(self) -> str | None:
        """What computes the first ones; None = torch's operators."""
        first = self._groups[0] if self._groups else None
        return first.kernel if isinstance(first, PackedExperts) else None

    @property
    def experts(self) -> list[Expert]:
        """All of them in the usual order; of those in another, copies."""
        return [each.expert() for each in self.held]

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
        row_index, weights = row_index.to(self.device, torch.int64), weights.to(self.device)
        first_expert = first_pair = 0
        if not (self._groups and self._groups[0].overwrites):
            total.zero_()
        for group in self._groups:
            experts = slice(first_expert, first_expert + len(group.held))
            chosen = slice(first_pair, first_pair + int(counts[experts].sum()))
            sums = torch.empty_like(total) if first_expert and group.overwrites else total
            pairs = Pairs(row_index[chosen], counts[experts], *self._weighed(experts, counts, weights[chosen]))
            group.run(hidden_states, pairs, sums)
            if sums is not total:
                total += sums
            first_expert, first_pair = experts.stop, chosen.stop
        if total is not out:
            out.copy_(total)

    def _weighed(self, experts: slice, counts: npt.NDArray[np.int64], weights: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights of what goes into these experts, None = all are 1, and of what comes out."""
        weighs_inputs = self._weighs_inputs[experts]
        if not weighs_inputs.any():
            return None, weights
        is_input = torch.from_numpy(np.repeat(weighs_inputs, counts[experts])).to(self.device)
        # As the model does where weights multiply inputs: the weight to the type of the rows first.
        return torch.where(is_input, weights.to(self.dtype).float(), 1), torch.where(is_input, 1, weights)


def _group(held: Sequence[HeldExpert], dtype: torch.dtype, deterministic: bool) -> _Group:
    """What computes neighbors of one kind."""
    if packed := [each for each in held if isinstance(each, PackedExpert)]:
        return PackedExperts(packed)
    if stacked := [each for each in held if isinstance(each, StackedExpert)]:
        return Stack(stacked)
    return OneByOne([each for each in held if isinstance(each, Alone)], dtype, deterministic)
