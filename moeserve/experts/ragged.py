"""All experts of one bank in one ragged matmul per projection and no return to the CPU in between: for CUDA, bfloat16.

N pairs sorted by expert, H hidden size, I intermediate size, E experts, G = 2I or I.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from moeserve.errors import ConfigError
from moeserve.experts.activations import activate
from moeserve.experts.expert import Expert
from moeserve.experts.feed_forward import FeedForward


def can_stack(experts: Sequence[Expert]) -> TypeGuard[Sequence[FeedForward]]:
    """Whether they are feed-forward experts of one shape, in bfloat16, with rows of whole 16 bytes: what the CUDA kernel takes."""
    first = experts[0] if experts else None
    if not isinstance(first, FeedForward) or first.gate_up_proj.dtype != torch.bfloat16:
        return False
    if any(proj.shape[1] % 8 for proj in (first.gate_up_proj, first.down_proj)):
        return False
    return all(isinstance(expert, FeedForward) and _shapes(expert) == _shapes(first) for expert in experts)


class Stack:
    """gate_up_proj [E, G, H], down_proj [E, H, I], gate_up_bias [E, G] and down_bias [E, H] or None, on `device`."""

    def __init__(self, experts: Sequence[FeedForward], device: torch.device) -> None:
        self._activation = experts[0].activation
        self._tensors = {
            name: torch.empty(len(experts), *tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in experts[0].tensors.items()
        }
        for index, expert in enumerate(experts):
            for name, tensor in expert.tensors.items():
                self._tensors[name][index].copy_(tensor)

    def replaced(self, changes: Mapping[int, Expert]) -> Stack:
        """A stack of its own with other experts at the indices of `changes`. Raises ConfigError when one is of another shape."""
        twin = copy.copy(self)
        twin._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()} if changes else self._tensors
        for index, expert in changes.items():
            if not isinstance(expert, FeedForward) or {name: t.shape for name, t in expert.tensors.items()} != self._shapes:
                raise ConfigError(f"the new local expert {index} is of another kind or size than the one it replaces")
            for name, tensor in expert.tensors.items():
                twin._tensors[name][index].copy_(tensor)
        return twin

    @property
    def num_experts(self) -> int:
        """How many experts it has: E."""
        return len(self._tensors["down_proj"])

    def expert(self, index: int) -> FeedForward:
        """One of them, as it lies here."""
        tensors = {name: tensor[index] for name, tensor in self._tensors.items()}
        return FeedForward(self._activation, **tensors)  # type: ignore[arg-type]

    @property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape[1:] for name, tensor in self._tensors.items()}

    def run(
        self,
        hidden_states: torch.Tensor,
        row_index: torch.Tensor,
        tokens_per_expert: npt.NDArray[np.int64],
        input_weights: torch.Tensor | None,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """As `PackedExperts.run`, of rows in bfloat16.

        hidden_states [R, H], row_index [N], tokens_per_expert [E], input_weights [N] float32 or None, weights [N] float32,
        out [R, H] float32, overwritten.
        """
        rows = hidden_states.index_select(0, row_index)
        if input_weights is not None:
            rows *= input_weights[:, None].to(rows.dtype)
        out.zero_().index_add_(0, row_index, self._answers(rows, torch.from_numpy(tokens_per_expert).to(rows.device)) * weights[:, None])

    def _answers(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """rows [N, H] bfloat16, those of each expert together; counts [E] int64 -> [N, H] float32."""
        ends = counts.cumsum(0).to(torch.int32)
        expert_of_pair = torch.repeat_interleave(counts, output_size=len(rows))
        projected = F.grouped_mm(rows, self._tensors["gate_up_proj"].transpose(1, 2), offs=ends)
        if "gate_up_bias" in self._tensors:
            projected += self._tensors["gate_up_bias"][expert_of_pair]
        answer = F.grouped_mm(activate(projected, self._activation, dim=1), self._tensors["down_proj"].transpose(1, 2), offs=ends)
        if "down_bias" in self._tensors:
            answer += self._tensors["down_bias"][expert_of_pair]
        return answer.float()


def _shapes(expert: FeedForward) -> tuple[str, dict[str, torch.Size]]:
    return expert.activation, {name: tensor.shape for name, tensor in expert.tensors.items()}
