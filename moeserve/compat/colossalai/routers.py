"""ColossalAI's routers in this process. T tokens, E experts, K choices per token, C capacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeserve.compat.colossalai.table import COLOSSALAI
from moeserve.compat.walk import gating_of
from moeserve.errors import ConfigError
from moeserve.gating import Routing, route

Noise = Callable[[Tensor], Tensor]


class MoeRouter(nn.Module):
    """What both routers share: eval mode takes capacity_factor_eval and drop_tks, training mode capacity_factor_train and the noise.

    `version` is the release of ColossalAI whose capacity is meant: up to 0.1.10 it was smaller for Top2Router. Raises ConfigError for
    parameters that are not allowed.
    """

    def __init__(self, noisy_func: Noise | None, given: dict[str, Any]) -> None:
        super().__init__()
        # Of what the table asks for, the sizes are the layer's and change nothing about the gate.
        serving = gating_of(COLOSSALAI, {**given, "dim_model": 1, "num_experts": 2})
        in_training = {"capacity_factor": float(given["capacity_factor_train"]), "drop_tokens": True}
        self.gatings = {False: serving, True: serving.model_copy(update=in_training)}
        self.noisy_func = noisy_func
        self._routing_loss: Tensor | None = None

    def route(self, inputs: Tensor) -> Routing:
        """Router logits [T, E] -> the routing of one request; the loss waits for `pop_routing_loss`."""
        if self.training and self.noisy_func is not None:
            inputs = self.noisy_func(inputs)
        routing = route(inputs, self.gatings[self.training], generator=torch.default_generator)
        self._routing_loss = routing.batch.aux_loss[0]
        return routing

    def forward(self, inputs: Tensor, use_kernel: bool = False, ep_group: object = None) -> tuple[Tensor, Tensor]:
        """Router logits [T, E] -> combine weights [T, E, C] float32, and where they are not 0 [T, E, C] bool.

        Raises ConfigError for use_kernel: there are no such kernels here. ep_group has no meaning in one process.
        """
        if use_kernel:
            raise ConfigError("colossalai: use_kernel is True; allowed in this process: False")
        routing = self.route(inputs)
        limit = int(routing.requested.max()) if routing.capacity is None else routing.capacity
        experts = F.one_hot(routing.topk_ids, inputs.shape[1]) * routing.kept[:, :, None]
        slots = F.one_hot(routing.slots.clamp(min=0), max(limit, 1))
        weights = torch.einsum("tk,tke,tkc->tec", routing.topk_weights, experts.float(), slots.float())
        return weights, weights.bool()

    def pop_routing_loss(self) -> Tensor:
        """The load-balancing loss of the last pass, once."""
        if self._routing_loss is None:
            raise ConfigError("colossalai: there is no routing loss to pop: the router has not run since the last one")
        loss, self._routing_loss = self._routing_loss, None
        return loss


class Top1Router(MoeRouter):
    """One expert per token, weighed by its raw probability; an expert over capacity keeps the first tokens, or random ones."""

    def __init__(
        self,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        min_capacity: int = 4,
        select_policy: str = "first",
        noisy_func: Noise | None = None,
        drop_tks: bool = True,
        *,
        version: str = "0.2.8",
    ) -> None:
        given = {
            "router": "Top1Router",
            "capacity_factor_train": capacity_factor_train,
            "capacity_factor_eval": capacity_factor_eval,
            "min_capacity": min_capacity,
            "select_policy": select_policy,
            "drop_tks": drop_tks,
            "version": version,
        }
        super().__init__(noisy_func, given)


class Top2Router(MoeRouter):
    """Two experts per token, weighed by their raw probabilities; an expert serves first choices before second ones."""

    def __init__(
        self,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        min_capacity: int = 4,
        noisy_func: Noise | None = None,
        drop_tks: bool = True,
        *,
        version: str = "0.2.8",
    ) -> None:
        given = {
            "router": "Top2Router",
            "capacity_factor_train": capacity_factor_train,
            "capacity_factor_eval": capacity_factor_eval,
            "min_capacity": min_capacity,
            "drop_tks": drop_tks,
            "version": version,
        }
        super().__init__(noisy_func, given)
