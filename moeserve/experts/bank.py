"""One grouped pass over the experts one host holds of one layer: gather, compute, weigh and sum.

R rows received, N (row, expert) pairs, H hidden size, E experts held here (a *local expert* is an index among them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
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
Integers = npt.NDArray[np.int64]
#: a group, and the local experts it is made of, ascending
GroupOf = tuple[_Group, slice | Integers]


@dataclass(frozen=True)
class BankForm:
    """What the experts of a bank have in common.

    dtype: of the rows, unless an expert knows better. scale_inputs: weights multiply what goes into an expert instead of what comes out
    (Llama 4); that of the shared expert always multiplies what comes out. deterministic: as for `Placer`.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device = _CPU
    scale_inputs: bool = False
    has_shared: bool = False
    deterministic: bool = False


class LayerBank(ABC):
    """Experts (or shards) of a layer on one device; the layer's shared expert, if there is one, is the last.

    Neighbors of one kind are computed together, in one call, where there is such a call for them; the others one by one.
    """

    def __init__(self, num_experts: int, form: BankForm) -> None:
        #: how many it has, the shared one among them
        self.num_experts = num_experts
        self.hidden_size, self.dtype, self.device = form.hidden_size, form.dtype, form.device
        self._weighs_inputs = np.full(num_experts, form.scale_inputs)
        self._weighs_inputs[num_experts - form.has_shared :] = False

    def claim(self, local_experts: torch.Tensor) -> bool:
        """Whether `run` can compute for these [N] at once, and for what was claimed before them; if so, it can until `let_go`."""
        return True

    def let_go(self) -> None:  # noqa: B027 - most banks hold all of their experts all the time
        """Of all that was claimed."""

    @abstractmethod
    def groups(self, counts: Integers) -> Generator[GroupOf]:
        """Groups of experts in their order, each to be computed before the next is asked for; counts [E]: pairs of each expert."""

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
        is_ours = out.device == self.device and out.is_contiguous()
        total = out if is_ours else torch.empty(out.shape, dtype=torch.float32, device=self.device)
        row_index, weights = row_index.to(self.device, torch.int64), weights.to(self.device)
        first_pair, adds = 0, False
        # Closed in any case: what a turn holds is held by nobody after it.
        with closing(self.groups(counts)) as groups:
            for group, experts in groups:
                chosen = slice(first_pair, first_pair + int(counts[experts].sum()))
                pairs = Pairs(row_index[chosen], counts[experts], *self._weighed(experts, counts, weights[chosen]))
                group.run(hidden_states, pairs, total, adds)
                first_pair, adds = chosen.stop, True
        if not adds:
            total.zero_()
        if total is not out:
            out.copy_(total)

    def _weighed(self, experts: slice | Integers, counts: Integers, weights: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights of what goes into these experts, None = all are 1, and of what comes out."""
        weighs_inputs = self._weighs_inputs[experts]
        if not weighs_inputs.any():
            return None, weights
        is_input = torch.from_numpy(np.repeat(weighs_inputs, counts[experts])).to(self.device)
        # As the model does where weights multiply inputs: the weight to the type of the rows first.
        return torch.where(is_input, weights.to(self.dtype).float(), 1), torch.where(is_input, 1, weights)


class ExpertBank(LayerBank):
    """A bank of experts that are all ready to run: no more than a list of held experts, and any number of banks may have the same ones."""

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
        shared. kernel: as for `Placer`; the rest is as in `BankForm`.

        Raises ConfigError when `kernel` cannot run here.
        """
        placer = Placer(device, kernel, deterministic)
        held = list(placer.placed(experts))
        if shared is not None:
            held += placer.placed([shared], one_by_one=True)
        super().__init__(len(held), BankForm(hidden_size, dtype, device, scale_inputs, shared is not None, deterministic))
        self._groups = grouped(held, dtype, deterministic)
        ends = np.cumsum([len(group.held) for group in self._groups]).tolist()
        self._placed = [(group, slice(end - len(group.held), end)) for group, end in zip(self._groups, ends, strict=True)]
        #: what computes all of them, and weighs what comes out
        self._whole = self._groups[0] if len(self._groups) == 1 and not self._weighs_inputs.any() else None

    def run(
        self, hidden_states: torch.Tensor, row_index: torch.Tensor, local_experts: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As for any bank; by a single call where there is one."""
        whole = self._whole
        if (
            isinstance(whole, PackedExperts)
            and hidden_states.dtype is self.dtype
            and whole.takes(hidden_states, row_index, local_experts, out)
        ):
            whole.run_pairs(hidden_states, row_index, local_experts, weights, out)
        else:
            super().run(hidden_states, row_index, local_experts, weights, out)

    def groups(self, counts: Integers) -> Generator[GroupOf]:
        """The same in every pass."""
        yield from self._placed

    @property
    def held(self) -> list[HeldExpert]:
        """All of them, as this bank has them."""
        return [each for group in self._groups for each in group.held]

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


def grouped(held: Sequence[HeldExpert], dtype: torch.dtype, deterministic: bool) -> list[_Group]:
    """Neighbors of one kind as what computes them together."""
    return [_group(list(alike), dtype, deterministic) for _, alike in groupby(held, key=lambda each: each.kind)]


def _group(held: Sequence[HeldExpert], dtype: torch.dtype, deterministic: bool) -> _Group:
    """What computes neighbors of one kind."""
    if packed := [each for each in held if isinstance(each, PackedExpert)]:
        return PackedExperts(packed)
    if stacked := [each for each in held if isinstance(each, StackedExpert)]:
        return Stack(stacked)
    return OneByOne([each for each in held if isinstance(each, Alone)], dtype, deterministic)
