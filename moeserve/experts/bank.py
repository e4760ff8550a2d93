"""One grouped pass over the experts of one layer: gather, project, activate, project, weigh and sum.

R rows received, N (row, expert) pairs, H hidden size, E experts held here (their index is the *slot*).
"""

from __future__ import annotations

import numpy as np
import torch

from moeserve.config import Activation
from moeserve.experts.grouped import expert_by_expert, ragged
from moeserve.experts.weights import ExpertWeights


class ExpertBank:
    """The experts one host holds of one layer, ready to run on one device."""

    def __init__(self, weights: ExpertWeights, activation: Activation) -> None:
        self.weights = weights
        self.activation = activation
        self.device = weights.gate_up_proj.device
        self.dtype = weights.gate_up_proj.dtype
        # The ragged CUDA kernel takes bfloat16 only, in rows of whole 16 bytes.
        is_aligned = all(proj.shape[2] % 8 == 0 for proj in (weights.gate_up_proj, weights.down_proj))
        self._grouped = ragged if self.device.type == "cuda" and self.dtype == torch.bfloat16 and is_aligned else expert_by_expert

    @property
    def num_experts(self) -> int:
        return self.weights.num_experts

    @property
    def hidden_size(self) -> int:
        return self.weights.down_proj.shape[1]

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
        self._grouped(
            self.weights,
            self.activation,
            hidden_states,
            row_index.to(self.device),
            tokens_per_expert,
            weights.to(self.device),
            total,
        )
        if total is not out:
            out.copy_(total)
