"""What the parameters of MindFormers' `MoEConfig` that choose experts mean here."""

from __future__ import annotations

from dataclasses import replace

from moeserve.compat.accepts import FLAG, one_of, optional, real, whole
from moeserve.compat.mindformers.routers import IGNORED_BY_V1, IN_GROUPS, V1, V2, V2_WITH_GROUPS
from moeserve.compat.table import OTHERWISE, Param, Row, When, effect, gate, note, notes, of

_RENORMALIZES = When(
    "true, with V2 and more than one expert per token",
    lambda v: V2.test(v) and v["norm_topk_prob"] and v["num_experts_chosen"] > 1,
    V2.beside,
)
_DOES_NOT_RENORMALIZE = When("otherwise, with V2", lambda v: V2.test(v) and not _RENORMALIZES.test(v), V2.beside)


def _groups(method: str, score: str) -> Row:
    keys = gate(num_expert_groups=of("n_group"), topk_groups=of("topk_group"), group_score=score)
    return effect(keys, on=method, when=replace(V2, beside=IN_GROUPS))


def _only_with_groups(name: str, key: str) -> Param:
    rows = effect(key, when=V2_WITH_GROUPS), note("only a topk_method with groups reads it", when=OTHERWISE)
    return Param(name, optional(whole(1)), None).means(*rows)


ROUTING_PARAMS = [
    Param("routing_policy", one_of("TopkRouterV1", "TopkRouterV2"), "TopkRouterV1").means(
        effect(
            gate(routing="mindformers", renormalize="post_drop", renormalize_eps=1e-9, capacity_rule="mindformers", aux_loss="mindformers"),
            "K rounds",
            when=replace(V1, at="'TopkRouterV1'"),
            example="TopkRouterV1",
        ),
        effect(gate(capacity_rule="mindformers_v2", aux_loss="none"), when=replace(V2, at="'TopkRouterV2', or use_gmm")),
    ),
    Param("use_gating_sigmoid", FLAG, False).means(
        effect(gate(scoring_func="sigmoid"), on=True, when=V2),
        effect(gate(scoring_func="softmax"), on=False, when=V2),
        note("TopkRouterV1 has softmax only", when=V1),
    ),
    Param("topk_method", one_of("greedy", "group_limited_greedy", "noaux_tc"), "greedy").means(
        effect(gate(num_expert_groups=None), on="greedy", when=V2),
        _groups("group_limited_greedy", "max"),
        _groups("noaux_tc", "top2_sum"),
        IGNORED_BY_V1,
    ),
    _only_with_groups("n_group", "layers.gating.num_expert_groups"),
    _only_with_groups("topk_group", "layers.gating.topk_groups"),
    Param("norm_topk_prob", FLAG, True).means(
        effect(gate(renormalize="pre_drop", renormalize_eps=1e-9), when=_RENORMALIZES, example=True),
        effect(gate(renormalize="none"), when=_DOES_NOT_RENORMALIZE),
        note("TopkRouterV1 always normalizes", when=V1),
    ),
    Param("routed_scaling_factor", real(), 1.0).means(effect("layers.gating.routed_scaling_factor", when=V2), IGNORED_BY_V1),
    Param("enable_sdrop", FLAG, False).means(
        effect(gate(drop_policy="position"), "earlier tokens are kept", on=True, when=V2),
        effect(gate(drop_policy="choice_major"), "first choices are kept", on=False, when=V2),
        IGNORED_BY_V1,
    ),
    *notes(
        "the bias of the selection is a tensor of the checkpoint; a layer made from a configuration alone has none",
        Param("balance_via_topk_bias", FLAG, False),
    ),
]
