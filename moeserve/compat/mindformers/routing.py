"""What the parameters of MindFormers' `MoEConfig` that choose experts mean here.

V1 and V2 are its two routers; `use_gmm` has a gate of its own, which is that of V2 without a capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeserve.compat.table import FLAG, Case, Param, Values, one_of, optional, real, whole

GATING = "layers.gating"
V2 = {"routing_policy": "TopkRouterV2"}
ONLY_V2 = "TopkRouterV2 alone reads it"


def is_v1(values: Values) -> bool:
    """Whether `TopkRouterV1` routes; with `use_gmm` it never does."""
    return values["routing_policy"] == "TopkRouterV1" and not values["use_gmm"]


def is_v2(values: Values) -> bool:
    """Whether the routing is that of `TopkRouterV2`."""
    return not is_v1(values)


def v2_only(
    says: str, example: Any, sets: Callable[[Values], Mapping[str, Any]], at: str = "any", when: Callable[[Values], bool] = is_v2
) -> Case:
    """An effect under V2."""
    where = "with V2" if at == "any" else f"{at}, with V2"
    return Case("effect", says, example, where, lambda values: is_v2(values) and when(values), sets, V2)


def not_in_v1(example: Any, why: str = ONLY_V2) -> Case:
    """The parameter does nothing with `TopkRouterV1`."""
    return Case("note", why, example, "with V1", is_v1)


def _v1(values: Values) -> dict[str, Any]:
    keys = {"routing": "mindformers", "renormalize": "post_drop", "renormalize_eps": 1e-9, "capacity_rule": "mindformers"}
    return {f"{GATING}.{key}": value for key, value in {**keys, "aux_loss": "mindformers"}.items()}


def _v2(values: Values) -> dict[str, Any]:
    return {f"{GATING}.capacity_rule": "mindformers_v2", f"{GATING}.aux_loss": "none"}


def _normalised(values: Values) -> dict[str, Any]:
    if values["num_experts_chosen"] == 1 or not values["norm_topk_prob"]:
        return {f"{GATING}.renormalize": "none"}
    return {f"{GATING}.renormalize": "pre_drop", f"{GATING}.renormalize_eps": 1e-9}


def _groups(score: str) -> Callable[[Values], dict[str, Any]]:
    def keys(values: Values) -> dict[str, Any]:
        chosen = {"num_expert_groups": values["n_group"], "topk_groups": values["topk_group"], "group_score": score}
        return {f"{GATING}.{key}": value for key, value in chosen.items()}

    return keys


def has_groups(values: Values) -> bool:
    """Whether tokens choose inside groups of experts."""
    return is_v2(values) and values["topk_method"] != "greedy"


_IN_GROUPS = {**V2, "n_group": 4, "topk_group": 2}


def _group_param(name: str, key: str) -> Param:
    effect = Case(
        "effect",
        f"`{GATING}.{key}`",
        2,
        "with V2 and a topk_method with groups",
        has_groups,
        lambda values: {f"{GATING}.{key}": values[name]},
        {**_IN_GROUPS, "topk_method": "noaux_tc"},
    )
    note = Case("note", "only a topk_method with groups reads it", 2, "otherwise", lambda values: not has_groups(values))
    return Param(name, optional(whole(1)), None, [effect, note])


def _method(name: str, score: str) -> Case:
    says = f"`{GATING}.num_expert_groups`, `topk_groups`, `group_score` = `{score}`"
    return Case(
        "effect",
        says,
        name,
        f"'{name}', with V2",
        lambda values: is_v2(values) and values["topk_method"] == name,
        _groups(score),
        _IN_GROUPS,
    )


ROUTING_PARAMS = [
    Param(
        "routing_policy",
        one_of("TopkRouterV1", "TopkRouterV2"),
        "TopkRouterV1",
        [
            Case(
                "effect",
                f"`{GATING}.routing`, `capacity_rule`, `aux_loss` = `mindformers`: K rounds",
                "TopkRouterV1",
                "'TopkRouterV1'",
                is_v1,
                _v1,
            ),
            Case("effect", f"`{GATING}.capacity_rule` = `mindformers_v2`", "TopkRouterV2", "'TopkRouterV2'", is_v2, _v2),
        ],
    ),
    Param(
        "use_gating_sigmoid",
        FLAG,
        False,
        [
            v2_only(
                f"`{GATING}.scoring_func`",
                True,
                lambda values: {f"{GATING}.scoring_func": "sigmoid" if values["use_gating_sigmoid"] else "softmax"},
            ),
            not_in_v1(True, "TopkRouterV1 has softmax only"),
        ],
    ),
    Param(
        "topk_method",
        one_of("greedy", "group_limited_greedy", "noaux_tc"),
        "greedy",
        [
            v2_only(
                f"`{GATING}.num_expert_groups` unset",
                "greedy",
                lambda values: {f"{GATING}.num_expert_groups": None},
                "'greedy'",
                lambda values: bool(values["topk_method"] == "greedy"),
            ),
            _method("group_limited_greedy", "max"),
            _method("noaux_tc", "top2_sum"),
            not_in_v1("noaux_tc"),
        ],
    ),
    _group_param("n_group", "num_expert_groups"),
    _group_param("topk_group", "topk_groups"),
    Param(
        "norm_topk_prob",
        FLAG,
        True,
        [
            v2_only(f"`{GATING}.renormalize` = `pre_drop` when a token has more than one expert, else `none`", False, _normalised),
            not_in_v1(False, "TopkRouterV1 always normalises"),
        ],
    ),
    Param(
        "routed_scaling_factor",
        real(),
        1.0,
        [
            v2_only(
                f"`{GATING}.routed_scaling_factor`",
                2.5,
                lambda values: {f"{GATING}.routed_scaling_factor": values["routed_scaling_factor"]},
            ),
            not_in_v1(2.5),
        ],
    ),
    Param(
        "enable_sdrop",
        FLAG,
        False,
        [
            v2_only(
                f"`{GATING}.drop_policy` = `position`: earlier tokens stay",
                True,
                lambda v: {f"{GATING}.drop_policy": "position"},
                "true",
                lambda values: bool(values["enable_sdrop"]),
            ),
            v2_only(
                f"`{GATING}.drop_policy` = `choice_major`: first choices stay",
                False,
                lambda v: {f"{GATING}.drop_policy": "choice_major"},
                "false",
                lambda values: not values["enable_sdrop"],
            ),
            not_in_v1(True),
        ],
    ),
    Param(
        "balance_via_topk_bias",
        FLAG,
        False,
        [Case("note", "the bias of the selection is a tensor of the checkpoint; a layer made from a configuration alone has none", True)],
    ),
]
