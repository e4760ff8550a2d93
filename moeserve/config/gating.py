"""The knobs of the gate: which experts a token goes to, with what weight, and how many tokens an expert may take."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Renormalize = Literal["none", "pre_drop", "post_drop"]
DropPolicy = Literal["position", "choice_major", "probs"]


class GatingConfig(BaseModel):
    """How one layer routes. Field names are the field's own; every default is dropless and deterministic."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    #: experts per token, 1..E
    top_k: int = Field(default=2, ge=1)
    #: how router logits become scores
    scoring_func: Literal["softmax"] = "softmax"
    #: whether the chosen weights are scaled to sum to 1: never, over all choices, or over those that survived the drop
    renormalize: Renormalize = "none"
    #: multiplies the final weights
    routed_scaling_factor: float = 1.0
    #: rows an expert may take = ceil(K * capacity_factor * T / E); unset = no limit
    capacity_factor: float | None = Field(default=None, gt=0)
    #: lower bound of the capacity
    min_capacity: int = Field(default=0, ge=0)
    #: how the capacity is rounded
    capacity_rule: Literal["ceil"] = "ceil"
    #: the tokens that share a capacity: one request, or everything that is run at once
    capacity_scope: Literal["request", "batch"] = "request"
    #: false lifts the limit although capacity_factor is set
    drop_tokens: bool = True
    #: who stays when an expert is over capacity: earlier tokens, first choices before second ones, or higher scores
    drop_policy: DropPolicy = "position"
    #: the load-balancing loss that is reported
    aux_loss: Literal["none", "switch"] = "switch"
    #: multiplies the reported load-balancing loss
    aux_loss_weight: float = 1.0
    #: multiplies the reported router z-loss
    z_loss_weight: float = 1.0
