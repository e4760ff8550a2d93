"""The gates of a plan, one line for each different gate: which experts are chosen, with what weight."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moeserve.checkpoints import LayerSource
from moeserve.config import GatingConfig

_SCORES = {"softmax_topk": "softmax over the chosen logits", "sqrt_softplus": "root of softplus"}
_GROUP_SCORES = {"max": "their best expert", "top2_sum": "their two best experts"}
_MIXING = {
    "add": "shared expert added",
    "average": "averaged with the shared expert",
    "sigmoid": "shared expert times a sigmoid gate",
    "residual": "shared expert mixed in by two weights",
}


def gates(sources: Sequence[LayerSource]) -> Table:
    """Layers that are alike share a line."""
    lines: dict[str, list[int]] = {}
    for number, source in enumerate(sources):
        lines.setdefault(gate_line(source), []).append(number)
    table = Table("layers", box=SIMPLE_HEAD)
    table.add_column("gate", overflow="fold")
    for line, numbers in lines.items():
        table.add_row(_ranges(numbers), line)
    return table


def gate_line(source: LayerSource) -> str:
    """What a layer's gate computes, in the order it is computed."""
    spec, gating = source.spec, source.spec.gating
    if gating.routing == "caller":
        return "stays with the callers, which send topk_ids and topk_weights"
    parts = [
        "logits with a bias" if source.has_router_bias else "",
        f"logits within {gating.logit_softcap:g} by tanh" if gating.logit_softcap is not None else "",
        _scores(gating),
        ("selection bias" + " on the logits" * (gating.rank_by == "logits")) if source.has_selection_bias else "",
        _choice(gating),
        *_weights(gating),
        f"{spec.identity_experts} experts answer the token itself" if spec.identity_experts else "",
        _MIXING[spec.shared_mixing] if spec.shared_mixing else "no shared expert",
    ]
    return ", ".join(part for part in parts if part)


def _scores(gating: GatingConfig) -> str:
    learned = _SCORES.get(gating.scoring_func, gating.scoring_func)
    return {"learned": learned, "token_table": f"experts of the token id, {learned}"}.get(gating.routing, gating.routing)


def _choice(gating: GatingConfig) -> str:
    if gating.num_expert_groups is None:
        return f"top {gating.top_k}"
    by = _GROUP_SCORES[gating.group_score]
    return f"top {gating.top_k} in {gating.topk_groups} of {gating.num_expert_groups} groups by {by}"


def _weights(gating: GatingConfig) -> list[str]:
    renormalized = {"none": "not renormalized", "pre_drop": "renormalized", "post_drop": "renormalized after drops"}[gating.renormalize]
    return [
        "renormalized" if gating.scoring_func == "softmax_topk" else renormalized,
        "" if gating.routed_scaling_factor == 1 else f"times {gating.routed_scaling_factor:g}",
        "weights multiply the inputs" if gating.scale_inputs else "",
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
