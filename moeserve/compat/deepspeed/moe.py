"""DeepSpeed's `MoE` layer in this process, every expert in it. T tokens, H hidden size, E experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeserve.compat.combine import run_experts
from moeserve.compat.deepspeed.table import DEEPSPEED
from moeserve.compat.walk import gating_of
from moeserve.gating import Routing, route

_JITTER = 1e-2


class MoE(nn.Module):
    """A drop-in for `deepspeed.moe.layer.MoE`: the same parameters, return values and state-dict keys.

    expert is any nn.Module [.., H] -> [.., H]; it is copied num_experts times. As there, eval mode takes eval_capacity_factor, training
    mode takes capacity_factor and the noise of noisy_gate_policy, and random numbers come from torch's global generator. Unlike there,
    all experts live in this process whatever ep_size is, used_token counts for every k, and no input is too small. Raises ConfigError
    for parameters that are not allowed.

    Shazeer et al. 2017 (arXiv 1701.06538), Lepikhin et al. 2020 (arXiv 2006.16668); residual: Rajbhandari et al. 2022 (arXiv 2201.05596).
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in {"self", "expert", "__class__"}}
        self.num_experts, self.ep_size, self.num_local_experts = num_experts, ep_size, num_experts // ep_size
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.deepspeed_moe = MOELayer(TopKGate(given), Experts(expert, num_experts))
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing: there are no process groups in one process."""

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [.., H], used_token [T] -> (output [.., H], l_aux scalar, exp_counts [E] int64: demand before drops)."""
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            residual = self.mlp(hidden_states)
            residual = residual[0] if isinstance(residual, tuple) else residual
            share = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., 0:1] + residual * share[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


class Experts(nn.Module):
    """num_experts copies of one module."""

    def __init__(self, expert: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList([copy.deepcopy(expert) for _ in range(num_experts)])


class TopKGate(nn.Module):
    """The linear gate `wg` and what follows it, in float32. `given`: parameters of `MoE`."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        serving = gating_of(DEEPSPEED, given | {"use_residual": False})
        self.gatings = {False: serving, True: serving.model_copy(update={"capacity_factor": float(given["capacity_factor"])})}
        self.noise = given["noisy_gate_policy"]
        self.wg = nn.Linear(given["hidden_size"], given["num_experts"], bias=False)

    def forward(self, rows: Tensor, used_token: Tensor | None) -> Routing:
        """[T, H] -> the routing of one request."""
        rows, gating = rows.float(), self.gatings[self.training]
        if self.training and self.noise == "Jitter":
            rows = rows * torch.empty_like(rows).uniform_(1 - _JITTER, 1 + _JITTER)
        if self.training and self.noise == "RSample" and gating.top_k == 1:
            gating = gating.model_copy(update={"noise": "rsample", "seed": 0})
        logits = F.linear(rows, self.wg.weight.float())
        return route(logits, gating, used_token, generator=torch.default_generator)


class MOELayer(nn.Module):
    """Gate and experts; keeps the loss and the counts of the last pass."""

    def __init__(self, gate: TopKGate, experts: Experts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.l_aux = torch.zeros(())
        self.exp_counts = torch.zeros(len(experts.deepspeed_experts), dtype=torch.int64)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None) -> Tensor:
        """[.., H] -> [.., H]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.gate(rows, None if used_token is None else used_token.reshape(-1).bool())
        self.l_aux, self.exp_counts = routing.batch.aux_loss[0], routing.requested
        return run_experts(rows, routing, list(self.experts.deepspeed_experts)).view_as(hidden_states)
