"""The knobs of the gate: which experts a token goes to, with what weight, and how many tokens an expert may take."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moeserve.config.values import MAX_SIZE, Experts, Size

ScoringFunc = Literal["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"]
BuiltInRouting = Literal[
    "learned", "expert_choice", "hash", "token_table", "random", "least_loaded", "similarity", "mindformers", "sparsemixer", "caller"
]
#: the routings that need the id of every token
BY_TOKEN_ID: Final = frozenset({"hash", "token_table"})
Ranking = Literal["scores", "logits"]
GroupScore = Literal["max", "top2_sum"]
Renormalize = Literal["none", "pre_drop", "post_drop"]
CapacityRule = Literal["ceil", "deepspeed", "colossalai", "colossalai_legacy", "mindformers", "mindformers_v2", "trustformers"]
CapacityScope = Literal["request", "batch", "group"]
DropPolicy = Literal["position", "choice_major", "probs", "random"]
Noise = Literal["none", "jitter", "rsample", "gumbel_second", "normal", "uniform"]
AuxLoss = Literal["none", "switch", "deepspeed", "deepspeed_topk", "colossalai", "mindformers"]
RequestOverride = Literal["capacity_factor", "noise"]

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class GatingConfig(BaseModel):
    """How one layer routes. Field names are the field's own; every default is dropless and deterministic."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    #: experts per token, 1..E
    top_k: Experts = 2
    #: how router logits become scores; softmax_topk is a softmax over the chosen logits alone
    scoring_func: ScoringFunc = "softmax"
    #: who chooses: the K largest scores (learned), another algorithm, or a plug-in "package.module:Class"
    routing: str = "learned"
    #: group-limited routing: experts stand in this many equal groups, and a token chooses inside its best topk_groups
    num_expert_groups: Experts | None = None
    topk_groups: Experts | None = None
    #: how good a group is: its best expert, or the sum of its best two
    group_score: GroupScore = "max"
    #: whether the chosen weights are scaled to sum to 1: never, over all choices, or over those that survived the drop
    renormalize: Renormalize = "none"
    #: added to that sum before dividing by it; unset = 1e-20 for pre_drop; for post_drop the sum is at least float32's eps
    renormalize_eps: float | None = Field(default=None, ge=0)
    #: the ranking of a token's experts: scores, or logits; the selection bias of a layer is added to it
    rank_by: Ranking = "scores"
    #: c * tanh(x / c) replaces the router's logits x; unset = no cap
    logit_softcap: float | None = Field(default=None, gt=0)
    #: multiplies the final weights
    routed_scaling_factor: float = 1.0
    #: weights multiply the input of an expert instead of its output
    scale_inputs: bool = False
    #: the distance from the best logit within which experts share the weight of a choice; for routing = "sparsemixer"
    sparsemixer_eps: float = Field(default=0.01, ge=0)
    #: rows an expert may take = K * capacity_factor * T / E, rounded by capacity_rule; unset = no limit
    capacity_factor: float | None = Field(default=None, gt=0)
    #: lower bound of the capacity
    min_capacity: int = Field(default=0, ge=0, le=MAX_SIZE)
    #: how the capacity is rounded
    capacity_rule: CapacityRule = "ceil"
    #: the capacity is rounded up to a multiple of this
    capacity_multiple: Size = 1
    #: the tokens that share a capacity: one request, a whole batch, or expert_group_size tokens of a request
    capacity_scope: CapacityScope = "request"
    #: tokens per capacity group; the last group of a request may be smaller
    expert_group_size: Size | None = None
    #: false lifts the limit although capacity_factor is set
    drop_tokens: bool = True
    #: kept choices of an expert over capacity: earlier tokens, first choices before second ones, higher scores, or a random set
    drop_policy: DropPolicy = "position"
    #: noise in hidden states (jitter), the selection (rsample; gumbel_second: second choice only), or the logits (normal, uniform)
    noise: Noise = "none"
    #: eps of jitter and uniform (unset = 0.01), standard deviation of normal (unset = 1 / E^2)
    noise_scale: float | None = Field(default=None, ge=0)
    #: the seed of every request's random numbers; every random setting needs one
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    #: the load-balancing loss that is reported
    aux_loss: AuxLoss = "switch"
    #: multiplies the reported load-balancing loss
    aux_loss_weight: float = 1.0
    #: multiplies the reported router z-loss
    z_loss_weight: float = 1.0
    #: settings that a request may override; noise includes the seed
    request_overrides: Annotated[tuple[RequestOverride, ...], Field(strict=False)] = ()

    @field_validator("routing")
    @classmethod
    def _is_built_in_or_import_path(cls, routing: str) -> str:
        if routing not in get_args(BuiltInRouting) and not _IMPORT_PATH.fullmatch(routing):
            raise ValueError(
                f"gating.routing is {routing!r}; allowed: {', '.join(get_args(BuiltInRouting))}, or a plug-in 'package.module:Class'"
            )
        return routing

    @model_validator(mode="after")
    def _knobs_fit_together(self) -> Self:
        for is_impossible, sentence in (*self._selection_rules(), *self._capacity_rules(), *self._chance_rules(), *self._noise_rules()):
            if is_impossible:
                raise ValueError(sentence)
        return self

    def _drawn_by_chance(self) -> dict[str, bool]:
        return {
            f"noise = {self.noise!r}": self.noise != "none",
            "drop_policy = 'random'": self.drop_policy == "random",
            "routing = 'random'": self.routing == "random",
        }

    def choices_per_token(self, num_experts: int) -> int:
        """K of the routing's [T, K]: with expert choice a token may be taken by any number of experts."""
        return num_experts if self.routing == "expert_choice" else self.top_k

    def _selection_rules(self) -> list[tuple[bool, str]]:
        has_groups, built_in = self.num_expert_groups is not None, self.routing in get_args(BuiltInRouting)
        is_scored = self.routing in {"learned", "expert_choice", "token_table"} or not built_in
        return [
            (has_groups != (self.topk_groups is not None), "gating.num_expert_groups and gating.topk_groups must be given together"),
            (
                (self.topk_groups or 1) > (self.num_expert_groups or 1) and has_groups,
                f"gating.topk_groups is {self.topk_groups}, more than gating.num_expert_groups = {self.num_expert_groups}",
            ),
            (
                self.group_score != "max" and not has_groups,
                f"gating.group_score = {self.group_score!r} needs gating.num_expert_groups and gating.topk_groups",
            ),
            (
                has_groups and self.routing != "learned",
                f"gating.num_expert_groups limits learned routing only; gating.routing is {self.routing!r}",
            ),
            (
                not is_scored and self.scoring_func != "softmax",
                f"gating.scoring_func = {self.scoring_func!r} has no meaning with gating.routing = {self.routing!r}",
            ),
            (
                self.rank_by != "scores" and self.routing != "learned",
                f"gating.rank_by = {self.rank_by!r} has no meaning with gating.routing = {self.routing!r}",
            ),
            (
                self.routing == "expert_choice" and self.scoring_func == "softmax_topk",
                "gating.scoring_func = 'softmax_topk' needs choices of tokens, which gating.routing = 'expert_choice' does not have",
            ),
            (
                self.renormalize == "none" and self.renormalize_eps is not None,
                "gating.renormalize_eps needs gating.renormalize = 'pre_drop' or 'post_drop'",
            ),
            (
                self.aux_loss == "mindformers" and self.routing not in {"learned", "mindformers"},
                f"gating.aux_loss = 'mindformers' is defined for rounds of choices, not for gating.routing = {self.routing!r}",
            ),
        ]

    def _capacity_rules(self) -> list[tuple[bool, str]]:
        by_groups = self.capacity_scope == "group"
        by_experts = self.routing == "expert_choice"
        return [
            (
                by_groups != (self.expert_group_size is not None),
                "gating.capacity_scope = 'group' and gating.expert_group_size must be given together",
            ),
            (
                self.min_capacity > 0 and self.capacity_rule in {"mindformers", "mindformers_v2", "trustformers"},
                f"gating.min_capacity has no meaning with gating.capacity_rule = {self.capacity_rule!r}, which has no lower bound",
            ),
            (
                by_experts and (self.capacity_factor is None or not self.drop_tokens),
                "gating.routing = 'expert_choice' needs gating.capacity_factor and gating.drop_tokens = true: "
                "they set how many tokens an expert takes",
            ),
            (
                not self.drop_tokens and "capacity_factor" in self.request_overrides,
                "gating.request_overrides cannot have 'capacity_factor' with gating.drop_tokens = false, which lifts every limit",
            ),
            (
                by_experts and self.capacity_rule not in {"ceil", "trustformers"},
                f"gating.capacity_rule = {self.capacity_rule!r} has no meaning with gating.routing = 'expert_choice'",
            ),
            (
                by_experts and self.drop_policy != "position",
                f"gating.drop_policy = {self.drop_policy!r} has no meaning with gating.routing = 'expert_choice': nothing is dropped",
            ),
            (
                self.routing == "mindformers" and self.drop_policy in {"probs", "random"},
                f"gating.drop_policy = {self.drop_policy!r} has no meaning with gating.routing = 'mindformers': "
                "it serves first choices first",
            ),
        ]

    def _chance_rules(self) -> list[tuple[bool, str]]:
        return [
            (is_random and self.seed is None, f"gating.seed is required with gating.{key}")
            for key, is_random in self._drawn_by_chance().items()
        ]

    def _noise_rules(self) -> list[tuple[bool, str]]:
        on_selection = self.noise in {"rsample", "gumbel_second"}
        on_logits = self.noise in {"jitter", "normal", "uniform"}
        return [
            (
                on_selection and self.routing != "learned",
                f"gating.noise = {self.noise!r} acts on learned routing only; gating.routing is {self.routing!r}",
            ),
            (
                on_selection and self.num_expert_groups is not None,
                f"gating.noise = {self.noise!r} cannot be combined with gating.num_expert_groups",
            ),
            (
                on_logits and self.routing in {"hash", "random", "least_loaded", "similarity", "caller"},
                f"gating.noise = {self.noise!r} has no meaning with gating.routing = {self.routing!r}, which does not use the logits",
            ),
            (
                self.noise == "gumbel_second" and self.top_k != 2,
                f"gating.noise = 'gumbel_second' is about the second of two choices; gating.top_k is {self.top_k}",
            ),
            (
                self.noise_scale is not None and not on_logits,
                f"gating.noise_scale has no meaning with gating.noise = {self.noise!r}",
            ),
        ]
