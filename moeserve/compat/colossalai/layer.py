"""ColossalAI's experts and MoE layer in this process, every expert in it. T tokens, H hidden size, E experts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeserve.compat.colossalai.routers import MoeRouter
from moeserve.compat.combine import run_experts
from moeserve.errors import ConfigError


class Experts(nn.Module):
    """num_experts modules of one class, each made with expert_args."""

    def __init__(self, expert: type[nn.Module], num_experts: int, **expert_args: Any) -> None:
        super().__init__()
        self.num_local_experts = num_experts
        self.experts = nn.ModuleList([expert(**expert_args) for _ in range(num_experts)])


class MoeLayer(nn.Module):
    """A drop-in for `colossalai.nn.layer.moe.MoeLayer`: the same parameters, return values and state-dict keys.

    Gate weights are drawn from a normal distribution of deviation sqrt(0.1 / dim_model), cut off at 2, as there. Raises ConfigError when
    the experts are not num_experts.
    """

    def __init__(self, dim_model: int, num_experts: int, router: MoeRouter, experts: Experts) -> None:
        super().__init__()
        if len(experts.experts) != num_experts:
            raise ConfigError(f"colossalai: num_experts is {num_experts}; allowed: {len(experts.experts)}, the number of the experts given")
        self.d_model = dim_model
        self.num_experts = num_experts
        self.gate_weight = nn.Parameter(torch.empty(num_experts, dim_model))
        self.router = router
        self.experts = experts
        nn.init.trunc_normal_(self.gate_weight, std=math.sqrt(0.1 / dim_model))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[.., H] -> (answer [.., H], load-balancing loss, scalar)."""
        rows = inputs.reshape(-1, self.d_model)
        routing = self.router.route(F.linear(rows.float(), self.gate_weight.float()))
        answer = run_experts(rows, routing, list(self.experts.experts))
        return answer.view_as(inputs), self.router.pop_routing_loss()
