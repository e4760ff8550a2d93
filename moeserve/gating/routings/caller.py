"""Nobody here chooses: the gate stays with the model, and callers bring topk_ids and topk_weights."""

from __future__ import annotations

from moeserve.errors import InvalidRequest
from moeserve.gating.gate_input import GateInput, Selection


def by_caller(gate: GateInput) -> Selection:
    raise InvalidRequest("topk_ids is required: this layer is routed by its callers", "topk_ids")
