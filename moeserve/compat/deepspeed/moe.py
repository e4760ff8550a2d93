"""DeepSpeed's `MoE` layer in this process, or in front of a service that has its experts. T tokens, H hidden size, E experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeserve.checkpoints import SavedLayer
from moeserve.client import Client
from moeserve.compat.combine import run_experts
from moeserve.compat.deepspeed.table import DEEPSPEED
from moeserve.compat.remote import RemoteLayer
from moeserve.compat.saving import ExpertArgs, save_layers, saved_layer
from moeserve.compat.walk import gating_of
from moeserve.errors import ConfigError
from moeserve.gating import Routing, route

_JITTER = 1e-2
_NOT_OF_THE_TABLE = {"self", "expert", "target", "layer", "token", "__class__"}


class MoE(nn.Module):
    """A drop-in for `deepspeed.moe.layer.MoE`: the same parameters, return values and state-dict keys.

    expert is any nn.Module [.., H] -> [.., H]; it is copied num_experts times. As there, eval mode takes eval_capacity_factor, training
    mode takes capacity_factor and the noise of noisy_gate_policy, and random numbers come from torch's global generator. Unlike there,
    all experts live in this process whatever ep_size is, used_token counts for every k, and no input is too small. Raises ConfigError
    for parameters that are not allowed.

    With `target`, "host:port" of a service or a Client, tokens go to `layer` of that service instead (`token`: its bearer token): in
    evaluation mode, with equal answers, losses and counts; what is drawn by chance is drawn there. The service routes and mixes in the
    residual, so this process holds no experts, and state_dict has the gate alone. Raises ConfigError in training mode, and for
    used_token with use_residual: unused tokens are answered with zeros there.

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
        *,
        target: str | Client | None = None,
        layer: int | str = 0,
        token: str | None = None,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in _NOT_OF_THE_TABLE}
        self.num_experts, self.ep_size, self.num_local_experts = num_experts, ep_size, num_experts // ep_size
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        sizes = {"hidden_size": hidden_size, "num_experts": num_experts, "top_k": k}
        self._remote = None if target is None else RemoteLayer(target, layer, token, sizes)
        self.deepspeed_moe = MOELayer(TopKGate(given), None if target is not None else Experts(expert, num_experts))
        if use_residual and target is None:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing: there are no process groups in one process."""

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [.., H], used_token [T] -> (output [.., H], l_aux scalar, exp_counts [E] int64: demand before drops)."""
        if self._remote is not None:
            return self._forward_there(self._remote, hidden_states, used_token)
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            residual = self.mlp(hidden_states)
            residual = residual[0] if isinstance(residual, tuple) else residual
            share = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., 0:1] + residual * share[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts

    def save(self, folder: str | Path, name: str = "layers.0", expert_args: ExpertArgs = None) -> None:
        """Write a checkpoint folder that `moeserve serve` takes, with this layer as it answers in evaluation mode.

        expert_args: what the expert's class is made with, or a list with that of each; not needed for nn.Sequential(Linear, GELU or ReLU,
        Linear). Raises ConfigError when it is needed and does not fit, or the class cannot be imported by its path.
        """
        save_layers(folder, {name: self}, expert_args)

    def saved(self, name: str, expert_args: ExpertArgs = None) -> SavedLayer:
        """This layer as it goes into a folder; see `save`."""
        experts = self.deepspeed_moe.experts
        if experts is None:
            raise ConfigError("deepspeed: a layer with target= has no experts to save: they are in the service")
        gate = self.deepspeed_moe.gate
        modules = [*experts.deepspeed_experts, *([self.mlp] if self.use_residual else [])]
        mixer = self.coefficient.state_dict() if self.use_residual else {}
        return saved_layer(name, gate.wg.weight, gate.gatings[False], modules, expert_args, mixer)

    def _forward_there(self, remote: RemoteLayer, hidden_states: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.use_residual and used_token is not None:
            raise ConfigError(
                "deepspeed: used_token cannot be given with use_residual and target=: a service answers unused tokens with zeros"
            )
        used = None if used_token is None else used_token.reshape(-1).bool()
        out = remote.forward(hidden_states.reshape(-1, hidden_states.shape[-1]), used, self.training)
        self.deepspeed_moe.l_aux = torch.tensor(out.aux_loss, device=hidden_states.device)
        self.deepspeed_moe.exp_counts = out.requested
        return out.hidden_states.view_as(hidden_states), self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


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
    """Gate and experts, None where a service has them; keeps the loss and the counts of the last pass."""

    def __init__(self, gate: TopKGate, experts: Experts | None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.l_aux = torch.zeros(())
        self.exp_counts = torch.zeros(gate.wg.out_features, dtype=torch.int64)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None) -> Tensor:
        """[.., H] -> [.., H]."""
        assert self.experts is not None, "MoE asks the service instead"
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.gate(rows, None if used_token is None else used_token.reshape(-1).bool())
        self.l_aux, self.exp_counts = routing.batch.aux_loss[0], routing.requested
        return run_experts(rows, routing, list(self.experts.deepspeed_experts)).view_as(hidden_states)
