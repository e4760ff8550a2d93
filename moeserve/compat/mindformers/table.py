"""Every parameter of MindFormers' `MoEConfig` in one table, and which values do not fit each other."""

from __future__ import annotations

from moeserve.compat.mindformers.capacity import CAPACITY_PARAMS
from moeserve.compat.mindformers.execution import EXECUTION_PARAMS
from moeserve.compat.mindformers.losses import LOSS_PARAMS
from moeserve.compat.mindformers.routing import GATING, ROUTING_PARAMS, has_groups
from moeserve.compat.sizes import expert_extras, hidden_size_extra
from moeserve.compat.table import Rule, System, same, whole

MINDFORMERS = System(
    name="mindformers",
    source="`mindformers.modules.transformer.moe.MoEConfig` of MindFormers 1.5, and the `moe_config` keys added after it",
    params=[
        same("expert_num", whole(1), 1, "layers.num_experts", 4),
        same("num_experts_chosen", whole(1), 1, f"{GATING}.top_k", 3),
        same("moe_intermediate_size", whole(1), 1407, "layers.intermediate_size", 96),
        *ROUTING_PARAMS,
        *CAPACITY_PARAMS,
        *LOSS_PARAMS,
        *EXECUTION_PARAMS,
        hidden_size_extra(),
        *expert_extras("hidden_size", intermediate=False),
    ],
    rules=[
        Rule(
            lambda v: v["num_experts_chosen"] > v["expert_num"],
            lambda v: f"num_experts_chosen is {v['num_experts_chosen']}; allowed: 1 to expert_num = {v['expert_num']}",
        ),
        Rule(
            lambda v: v["expert_num"] % v["expert_parallel"] != 0,
            lambda v: f"expert_parallel is {v['expert_parallel']}; allowed: what divides expert_num = {v['expert_num']}",
        ),
        Rule(
            lambda v: v["hot_expert_num"] > v["expert_num"],
            lambda v: f"hot_expert_num is {v['hot_expert_num']}; allowed: 0 to expert_num = {v['expert_num']}",
        ),
        Rule(
            lambda v: has_groups(v) and (v["n_group"] is None or v["topk_group"] is None),
            lambda v: f"topk_method is {v['topk_method']!r}, which needs n_group and topk_group",
        ),
        Rule(
            lambda v: has_groups(v) and v["expert_num"] % v["n_group"] != 0,
            lambda v: f"n_group is {v['n_group']}; allowed: what divides expert_num = {v['expert_num']}",
        ),
        Rule(
            lambda v: has_groups(v) and v["topk_group"] > v["n_group"],
            lambda v: f"topk_group is {v['topk_group']}; allowed: 1 to n_group = {v['n_group']}",
        ),
        Rule(
            lambda v: has_groups(v) and v["num_experts_chosen"] > v["expert_num"] // v["n_group"] * v["topk_group"],
            lambda v: f"num_experts_chosen is {v['num_experts_chosen']}; allowed: what topk_group = {v['topk_group']} groups hold",
        ),
        Rule(
            lambda v: v["aux_loss_types"] is not None and len(v["aux_loss_types"]) != len(v["aux_loss_factors"] or ()),
            lambda v: (
                f"aux_loss_factors is {v['aux_loss_factors']}; allowed: one number for each of aux_loss_types = {v['aux_loss_types']}"
            ),
        ),
    ],
    base={},
    smallest={"expert_num": 8, "num_experts_chosen": 2},
)
