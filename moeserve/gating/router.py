"""The linear map in front of the gate. T tokens, H hidden size, E experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moeserve.config import GatingConfig
from moeserve.gating.gate import route_requests
from moeserve.gating.routing import BatchRouting


class Router:
    """The gate of one layer: router logits = hidden_states @ gate^T in float32, then routing."""

    def __init__(self, gate: torch.Tensor, gating: GatingConfig) -> None:
        self.gate = gate.float()
        self.gating = gating

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    def __call__(self, hidden_states: torch.Tensor, request_sizes: Sequence[int], used_token: torch.Tensor | None) -> BatchRouting:
        """hidden_states [T, H] of several requests laid end to end. Raises InvalidRequest when a logit is not finite."""
        return route_requests(F.linear(hidden_states.float(), self.gate), self.gating, request_sizes, used_token)
