"""ColossalAI's experts and MoE layer in this process, or in front of a service that has the experts. T tokens, H hidden size, E experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeserve.checkpoints import SavedLayer
from moeserve.client import Client
from moeserve.compat.colossalai.routers import MoeRouter
from moeserve.compat.combine import run_experts
from moeserve.compat.remote import RemoteLayer
from moeserve.compat.saving import ExpertArgs, save_layers, saved_layer
from moeserve.errors import ConfigError


class Experts(nn.Module):
    """num_experts modules, each made by calling `expert`, a class or a function, with expert_args; ColossalAI's name of it is `expert_cls`.

    Raises ConfigError without one of the two names, or without experts.
    """

    def __init__(
        self,
        expert: Callable[..., nn.Module] | None = None,
        num_experts: int = 0,
        *,
        expert_cls: Callable[..., nn.Module] | None = None,
        **expert_args: Any,
    ) -> None:
        super().__init__()
        made_by = expert if expert_cls is None else expert_cls
        if made_by is None or num_experts < 1:
            raise ConfigError(f"colossalai: Experts has expert_cls {made_by} and num_experts {num_experts}; allowed: a class, at least 1")
        self.num_local_experts = num_experts
        self.expert_args = expert_args
        self.experts = nn.ModuleList([made_by(**expert_args) for _ in range(num_experts)])


class MoeLayer(nn.Module):
    """A drop-in for `colossalai.nn.layer.moe.MoeLayer`: the same parameters, return values and state-dict keys.

    Gate weights are drawn from a normal distribution of deviation sqrt(0.1 / dim_model), cut off at 2, as there. Raises ConfigError when
    the experts are not num_experts.

    With `target`, "host:port" of a service or a Client, tokens go to `layer` of that service instead (`token`: its bearer token): in
    evaluation mode, with equal answers and losses; what is drawn by chance is drawn there. The service routes, so `experts` may be None,
    is not kept, and state_dict has the gate alone. Raises ConfigError in training mode.
    """

    def __init__(
        self,
        dim_model: int,
        num_experts: int,
        router: MoeRouter,
        experts: Experts | None,
        *,
        target: str | Client | None = None,
        layer: int | str = 0,
        token: str | None = None,
    ) -> None:
        super().__init__()
        if experts is None and target is None:
            raise ConfigError("colossalai: experts is None; allowed: an Experts, or None with target=")
        if experts is not None and len(experts.experts) != num_experts:
            raise ConfigError(f"colossalai: num_experts is {num_experts}; allowed: {len(experts.experts)}, the number of the experts given")
        self.d_model = dim_model
        self.num_experts = num_experts
        self.gate_weight = nn.Parameter(torch.empty(num_experts, dim_model))
        self.router = router
        self.experts = experts if target is None else None
        sizes = {"hidden_size": dim_model, "num_experts": num_experts, "top_k": router.gatings[False].top_k}
        self._remote = None if target is None else RemoteLayer(target, layer, token, sizes)
        nn.init.trunc_normal_(self.gate_weight, std=math.sqrt(0.1 / dim_model))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[.., H] -> (answer [.., H], load-balancing loss, scalar)."""
        rows = inputs.reshape(-1, self.d_model)
        if self._remote is not None:
            out = self._remote.forward(rows, None, self.training)
            return out.hidden_states.view_as(inputs), torch.tensor(out.aux_loss, device=inputs.device)
        routing = self.router.route(F.linear(rows.float(), self.gate_weight.float()))
        answer = run_experts(rows, routing, list(self._own_experts().experts))
        return answer.view_as(inputs), self.router.pop_routing_loss()

    def save(self, folder: str | Path, name: str = "layers.0", expert_args: ExpertArgs = None) -> None:
        """Write a checkpoint folder that `moeserve serve` takes, with this layer as it answers in evaluation mode.

        expert_args: in place of those that Experts was made with. Raises ConfigError when they cannot be written down, or the class cannot
        be imported by its path; nn.Sequential(Linear, GELU or ReLU, Linear) needs neither.
        """
        save_layers(folder, {name: self}, expert_args)

    def saved(self, name: str, expert_args: ExpertArgs = None) -> SavedLayer:
        """This layer as it goes into a folder; see `save`."""
        experts = self._own_experts()
        args = experts.expert_args if expert_args is None else expert_args
        return saved_layer(name, self.gate_weight, self.router.gatings[False], list(experts.experts), args)

    def _own_experts(self) -> Experts:
        if self.experts is None:
            raise ConfigError("colossalai: a layer with target= has no experts here: they are in the service")
        return self.experts
