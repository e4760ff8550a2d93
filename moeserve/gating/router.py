"""The linear map in front of the gate. T tokens, H hidden size, E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import torch
import torch.nn.functional as F

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError
from moeserve.gating.chance import Chance
from moeserve.gating.elementwise import FAST, INVARIANT
from moeserve.gating.expert_groups import check_groups
from moeserve.gating.gate import check_layer_tensors, check_token_experts, route_requests
from moeserve.gating.noise import shake_hidden_states
from moeserve.gating.routing import BatchRouting
from moeserve.gating.routings import routing_of
from moeserve.kernels import InvariantLinear

_READS_TOKENS = ("similarity",)


class Router:
    """The gate of one layer: router logits = hidden_states @ gate^T + bias in float32, then routing.

    gate                   [E, H] float
    bias                   [E]    float, added to the logits
    score_correction_bias  [E]    float, added to the scores for selection only
    centroids              [E, H] float for routing = "similarity"; the rows of the gate unless given
    token_experts          [V, K] int for routing = "token_table": the experts of each token id

    Raises ConfigError when the tensors or the groups do not fit the number of experts, or a plug-in cannot be imported.
    """

    def __init__(
        self,
        gate: torch.Tensor,
        gating: GatingConfig,
        bias: torch.Tensor | None = None,
        score_correction_bias: torch.Tensor | None = None,
        centroids: torch.Tensor | None = None,
        token_experts: torch.Tensor | None = None,
    ) -> None:
        check_groups(gate.shape[0], gating)
        check_layer_tensors(gate.shape[0], score_correction_bias, centroids)
        check_token_experts(gate.shape[0], gating, token_experts)
        if gating.routing == "token_table" and token_experts is None:
            raise ConfigError("gating.routing = 'token_table' needs a table of the experts of each token id, which only a checkpoint has")
        routing_of(gating)
        self.gate = gate.float()
        self.gating = gating
        self.bias = None if bias is None else bias.float()
        self.score_correction_bias = None if score_correction_bias is None else score_correction_bias.float()
        self._logits: Callable[[torch.Tensor], torch.Tensor] = partial(F.linear, weight=self.gate, bias=self.bias)
        self._elementwise = FAST
        self.centroids = self.gate if centroids is None else centroids.float()
        self.token_experts = None if token_experts is None else token_experts.long()

    @property
    def num_experts(self) -> int:
        """How many experts there are to choose from: E."""
        return self.gate.shape[0]

    def invariant(self) -> Router:
        """The same gate, whose logits of a token are bitwise the same whatever other tokens there are.

        Raises ConfigError when its routing computes more than logits from what the tokens hold.
        """
        if self.gating.routing in _READS_TOKENS or ":" in self.gating.routing:
            raise ConfigError(
                f"model.deterministic is true, but gating.routing is {self.gating.routing!r}, which computes more than logits"
            )
        twin = copy(self)
        twin._logits = InvariantLinear(self.gate, self.bias)
        twin._elementwise = INVARIANT
        return twin

    def __call__(
        self,
        hidden_states: torch.Tensor,
        request_sizes: Sequence[int],
        used_token: torch.Tensor | None,
        token_ids: torch.Tensor | None = None,
        gating: GatingConfig | None = None,
    ) -> BatchRouting:
        """hidden_states [T, H] of several requests laid end to end, token_ids [T] int; `gating` instead of the layer's own.

        Raises InvalidRequest when a logit is not finite.
        """
        gating = gating or self.gating
        hidden_states = hidden_states.float()
        chance = Chance(request_sizes, hidden_states.device, gating.seed, None)
        return route_requests(
            self._logits(shake_hidden_states(hidden_states, gating, chance)),
            gating,
            request_sizes,
            used_token,
            chance,
            token_ids=token_ids,
            hidden_states=hidden_states,
            score_correction_bias=self.score_correction_bias,
            centroids=self.centroids,
            elementwise=self._elementwise,
            token_experts=self.token_experts,
        )
