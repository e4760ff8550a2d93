"""Every parameter of `mindformers.modules.transformer.moe.MoEConfig` of MindFormers 1.5, and the `moe_config` keys added after it."""

from __future__ import annotations

from moeserve.compat.accepts import Values, whole
from moeserve.compat.mindformers.capacity import CAPACITY_PARAMS
from moeserve.compat.mindformers.execution import EXECUTION_PARAMS
from moeserve.compat.mindformers.losses import LOSS_PARAMS
from moeserve.compat.mindformers.routers import has_groups
from moeserve.compat.mindformers.routing import ROUTING_PARAMS
from moeserve.compat.sizes import EXPERT_EXTRAS, HIDDEN_SIZE
from moeserve.compat.system import Rule, System, at_most, divides
from moeserve.compat.table import Param, effect, same

PARAMS = [
    same("expert_num", whole(1), 1, "layers.num_experts"),
    Param("num_experts_chosen", whole(1), 1).means(effect("layers.gating.top_k", example=3)),
    same("moe_intermediate_size", whole(1), 1407, "layers.intermediate_size"),
    *ROUTING_PARAMS,
    *CAPACITY_PARAMS,
    *LOSS_PARAMS,
    *EXECUTION_PARAMS,
    HIDDEN_SIZE,
    *EXPERT_EXTRAS,
]


def _are_too_few_in_groups(values: Values) -> bool:
    return has_groups(values) and values["num_experts_chosen"] > values["expert_num"] // values["n_group"] * values["topk_group"]


RULES = [
    at_most("num_experts_chosen", "expert_num"),
    divides("expert_parallel", "expert_num"),
    at_most("hot_expert_num", "expert_num", least=0),
    Rule(
        lambda v: has_groups(v) and (v["n_group"] is None or v["topk_group"] is None),
        lambda v: f"topk_method is {v['topk_method']!r}, which needs n_group and topk_group",
    ),
    divides("n_group", "expert_num", when=has_groups),
    at_most("topk_group", "n_group", when=has_groups),
    Rule(
        lambda v: has_groups(v) and v["topk_method"] == "noaux_tc" and v["n_group"] == v["expert_num"],
        lambda v: f"n_group is {v['n_group']}; allowed with 'noaux_tc': groups of two experts and more, expert_num = {v['expert_num']}",
    ),
    Rule(
        _are_too_few_in_groups,
        lambda v: f"num_experts_chosen is {v['num_experts_chosen']}; allowed: what topk_group = {v['topk_group']} groups hold",
    ),
    Rule(
        lambda v: v["aux_loss_types"] is not None and len(v["aux_loss_types"]) != len(v["aux_loss_factors"] or ()),
        lambda v: f"aux_loss_factors is {v['aux_loss_factors']}; allowed: one number for each of aux_loss_types = {v['aux_loss_types']}",
    ),
]

MINDFORMERS = System(name="mindformers", params=PARAMS, rules=RULES, base={}, smallest={"expert_num": 8, "num_experts_chosen": 2})
