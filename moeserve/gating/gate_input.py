"""What a routing sees, and what it answers. T tokens, H hidden size, E experts, K choices per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.gating.capacity import CAPACITY_SCOPES, Capacity, capacity
from moeserve.gating.chance import Chance
from moeserve.gating.elementwise import FAST, Elementwise
from moeserve.gating.segments import Segments


@dataclass(frozen=True)
class GateInput:
    """The tokens of several requests laid end to end, and what the layer owns.

    router_logits          [T, E] float32, finite, with the noise that acts on logits
    token_ids              [T]    int64
    hidden_states          [T, H] float32
    score_correction_bias  [E]    float32, added for selection only
    centroids              [E, H] float32
    token_experts          [V, K] int64, the experts of each token id
    """

    gating: GatingConfig
    router_logits: Tensor
    requests: Segments
    chance: Chance
    token_ids: Tensor | None = None
    hidden_states: Tensor | None = None
    score_correction_bias: Tensor | None = None
    centroids: Tensor | None = None
    elementwise: Elementwise = FAST
    token_experts: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """How many experts there are to choose from: E."""
        return self.router_logits.shape[1]

    @cached_property
    def capacity(self) -> Capacity | None:
        """What one expert may take from each capacity group; None = no limit."""
        return capacity(self.gating, self.requests.sizes, self.num_experts, self.gating.top_k)

    @cached_property
    def groups(self) -> Segments:
        """The tokens by capacity group, whether there is a limit or not."""
        sizes = CAPACITY_SCOPES[self.gating.capacity_scope](self.requests.sizes, self.gating).sizes
        return self.requests.divided(sizes)


@dataclass(frozen=True)
class Selection:
    """What a routing answers.

    scores       [T, E] float32, 0 or more, what load-balancing losses are made of
    topk_ids     [T, K] int64
    topk_scores  [T, K] float32, the weights before renormalization, scaling and drops
    kept         [T, K] bool, when the routing has itself decided what there is room for; None = capacity decides
    chosen       [T, K] bool, when not every column is a choice; None = every choice of a used token is
    """

    scores: Tensor
    topk_ids: Tensor
    topk_scores: Tensor
    kept: Tensor | None = None
    chosen: Tensor | None = None


Routing = Callable[[GateInput], Selection]
