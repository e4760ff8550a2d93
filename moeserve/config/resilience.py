"""What happens to rows whose host is lost, late or erring."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moeserve.config.table import Table
from moeserve.config.values import MAX_EXPERTS, MAX_SIZE, Seconds

ExpertFailure = Literal["retry", "renormalize", "residual", "fail"]


class LayerResilience(Table):
    """[layers.resilience]: what one layer does otherwise than [resilience] says."""

    on_expert_failure: ExpertFailure = "retry"
    k_min: int = Field(default=1, ge=0, le=MAX_EXPERTS)
    partial_after_ms: float = Field(default=500, ge=0, le=MAX_SIZE)


class ResilienceConfig(Table):
    """[resilience]: what happens when a host dies, hangs, errs or is late."""

    #: of choices whose expert lives nowhere: retry = wait for a host within the deadline; renormalize = answer without them, the others
    #: take over their weight; residual = answer without them; fail = UNAVAILABLE at once
    on_expert_failure: ExpertFailure = "retry"
    #: how many choices of each token an answer must have, else its request waits as with retry
    k_min: int = Field(default=1, ge=0, le=MAX_EXPERTS)
    #: how long an answer waits for choices of a lost or late host before it is given without them
    partial_after_ms: float = Field(default=500, ge=0, le=MAX_SIZE)
    #: a host that owes answers and sends nothing for so long, not even a heartbeat, counts as lost
    hang_after_ms: float = Field(default=1000, ge=300, le=MAX_SIZE)
    #: auto = rows that are late are sent to another copy too, at most 5% of all
    hedge: Literal["off", "auto"] = "off"
    #: deadline of a request that brings none
    request_timeout_s: Annotated[Seconds, Field(gt=0)] = 60.0

    def of_layer(self, layer: LayerResilience | None) -> ResilienceConfig:
        """As one layer changes it."""
        return self if layer is None else self.model_copy(update=layer.model_dump(exclude_unset=True))
