"""All experts of one bank in one ragged matmul per projection and no return to the CPU in between: for CUDA, bfloat16.

This kernel wants its experts one after the other in one tensor. So a host with a GPU copies those of a layer into a new stack whenever they
change, and has two stacks of the layer until the old one is retired; only what is missing is read.

N pairs sorted by expert, H hidden size, I intermediate size, E experts, S places of a stack, G = 2I or I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F

from moeserve.config import Activation
from moeserve.experts.activations import activate
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import FeedForward
from moeserve.experts.pairs import Pairs


class StackKind(NamedTuple):
    """What experts of one stack have in common: their activation, and the shapes of their tensors by name."""

    activation: Activation
    shapes: tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True, eq=False)
class StackedExpert:
    """The one at `index` of a stack: gate_up_proj [S, G, H], down_proj [S, H, I], and maybe gate_up_bias [S, G] and down_bias [S, H]."""

    kind: StackKind
    stack: Mapping[str, torch.Tensor]
    index: int

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.expert().nbytes

    def expert(self) -> FeedForward:
        """As it lies there."""
        tensors = {name: tensor[self.index] for name, tensor in self.stack.items()}
        return FeedForward(self.kind.activation, **tensors)  # type: ignore[arg-type]


class ExpertStacks:
    """Stacks on `device` for `count` experts that come one after the other: one for all of them if they are of one kind."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._left, self._device = count, device
        self._next: StackedExpert | None = None

    def place(self, expert: FeedForward) -> StackedExpert:
        """A copy in the next place."""
        kind = StackKind(expert.activation, tuple((name, tensor.shape) for name, tensor in expert.tensors.items()))
        placed = self._next
        if placed is None or placed.kind != kind:
            size = max(1, self._left)
            stack = {name: tensor.new_empty((size, *tensor.shape), device=self._device) for name, tensor in expert.tensors.items()}
            placed = StackedExpert(kind, stack, 0)
        for name, tensor in expert.tensors.items():
            placed.stack[name][placed.index].copy_(tensor)
        self._left -= 1
        is_full = placed.index + 1 == len(placed.stack["down_proj"])
        self._next = None if is_full else StackedExpert(kind, placed.stack, placed.index + 1)
        return placed


def can_stack(expert: Expert) -> TypeGuard[FeedForward]:
    """Whether it is a feed-forward expert in bfloat16, with rows of whole 16 bytes: what the CUDA kernel takes."""
    if not isinstance(expert, FeedForward) or expert.gate_up_proj.dtype != torch.bfloat16:
        return False
    return not any(proj.shape[1] % 8 for proj in (expert.gate_up_proj, expert.down_proj))


class Stack:
    """Experts of one kind, as they are if they are all of a stack, else copies in a stack of their own, so that the other is freed."""

    def __init__(self, held: Sequence[StackedExpert]) -> None:
        first = held[0]
        self._kind = first.kind
        is_whole = len(held) == len(first.stack["down_proj"])
        if not is_whole or any(one.stack is not first.stack or one.index != place for place, one in enumerate(held)):
            stacks = ExpertStacks(len(held), first.stack["down_proj"].device)
            held = [stacks.place(one.expert()) for one in held]
            first = held[0]
        #: those that it computes
        self.held = held
        self._tensors = {name: tensor[first.index : first.index + len(held)] for name, tensor in first.stack.items()}

    def run(self, hidden_states: torch.Tensor, pairs: Pairs, out: torch.Tensor, adds: bool) -> None:
        """As `PackedExperts.run`, of rows in bfloat16."""
        rows = hidden_states.index_select(0, pairs.row_index)
        if pairs.input_weights is not None:
            rows *= pairs.input_weights[:, None].to(rows.dtype)
        counts = torch.from_numpy(pairs.tokens_per_expert).to(rows.device)
        (out if adds else out.zero_()).index_add_(0, pairs.row_index, self._answers(rows, counts) * pairs.weights[:, None])

    def _answers(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """rows [N, H] bfloat16, those of each expert together; counts [E] int64 -> [N, H] float32."""
        ends = counts.cumsum(0).to(torch.int32)
        expert_of_pair = torch.repeat_interleave(counts, output_size=len(rows))
        projected = F.grouped_mm(rows, self._tensors["gate_up_proj"].transpose(1, 2), offs=ends)
        if "gate_up_bias" in self._tensors:
            projected += self._tensors["gate_up_bias"][expert_of_pair]
        answer = F.grouped_mm(activate(projected, self._kind.activation, dim=1), self._tensors["down_proj"].transpose(1, 2), offs=ends)
        if "down_bias" in self._tensors:
            answer += self._tensors["down_bias"][expert_of_pair]
        return answer.float()
