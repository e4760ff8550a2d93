"""What the parameters of MindFormers' `MoEConfig` that say how experts are kept, reached and computed mean here."""

from __future__ import annotations

from typing import Any

from moeserve.compat.mindformers.capacity import capacity_multiple
from moeserve.compat.mindformers.routing import V2, is_v1, is_v2
from moeserve.compat.table import FLAG, TEXT, Accepts, Case, Param, Values, noted, one_of, optional, real, whole

_TRAINING = "belongs to training: no effect on inference"
_KERNELS = "chooses kernels, not answers"


def _has_shared(values: Values) -> bool:
    return bool(values["shared_expert_num"] > 0)


def _shared(values: Values) -> dict[str, Any]:
    return {
        "layers.shared_expert.intermediate_size": values["shared_expert_num"] * values["moe_intermediate_size"],
        "layers.shared_expert.mixing": "sigmoid" if values["use_shared_expert_gating"] else "add",
    }


_EXPERT_PARAMS = [
    Param(
        "shared_expert_num",
        whole(0),
        0,
        [
            Case(
                "effect",
                "`layers.shared_expert` of shared_expert_num * moe_intermediate_size: that many experts, side by side",
                2,
                "above 0",
                _has_shared,
                _shared,
            ),
            Case("note", "no shared experts, here and there", 0, "0", lambda v: not _has_shared(v)),
        ],
    ),
    Param(
        "use_shared_expert_gating",
        FLAG,
        False,
        [
            Case(
                "effect",
                "`layers.shared_expert.mixing` = `sigmoid` of a gate of its own, else `add`",
                True,
                "with shared_expert_num above 0",
                _has_shared,
                _shared,
                {"shared_expert_num": 1},
            ),
            Case("note", "there is no shared expert for it to act on", True, "otherwise", lambda v: not _has_shared(v)),
        ],
    ),
    noted(
        "moe_shared_expert_overlap", FLAG, False, True, "orders work, changes no answer: a host computes the shared expert with the others"
    ),
    Param(
        "enable_cold_hot_expert",
        FLAG,
        False,
        [
            Case(
                "refusal",
                "not supported: cold experts cannot be given a smaller capacity than hot ones, and answers would differ",
                True,
                "true, with cold_token_percent below 1",
                lambda v: v["enable_cold_hot_expert"] and v["cold_token_percent"] < 1,
                beside={"cold_token_percent": 0.5},
            ),
            Case(
                "note",
                "not supported: which experts are hot is measured there while training; `placement.copies` takes them by number; "
                "answers are the same",
                True,
                "otherwise",
                lambda v: not v["enable_cold_hot_expert"] or v["cold_token_percent"] == 1,
            ),
        ],
    ),
    noted("hot_expert_num", whole(0), 0, 1, "only enable_cold_hot_expert reads it"),
    noted("cold_token_percent", real(above=0, maximum=1), 1.0, 0.5, "only enable_cold_hot_expert reads it"),
    noted("update_step", whole(1), 10000, 100, "only enable_cold_hot_expert reads it"),
    noted("moe_module_name", TEXT, "", "layers", "only enable_cold_hot_expert reads it"),
    Param(
        "router_dense_type",
        one_of("float32", "float16", "bfloat16"),
        "float32",
        [
            Case("note", "the gate always computes in float32; so does MindFormers for 'float16'", "float16"),
        ],
    ),
]


def _per_node(name: str) -> Param:
    return Param(
        name,
        FLAG,
        False,
        [
            Case(
                "effect",
                "`communication.pattern` = `hierarchical`: one message per node, passed on within it",
                True,
                "true",
                lambda v: bool(v[name]),
                lambda v: {"communication.pattern": "hierarchical"},
            ),
            Case("note", "a message goes to every host, here and there", False, "false", lambda v: not v[name]),
        ],
    )


_COMMUNICATION_PARAMS = [
    _per_node("group_wise_a2a"),
    noted("use_allgather_dispatcher", FLAG, False, True, "chooses how tensors travel, not answers"),
    _per_node("enable_deredundency"),
    noted("npu_nums_per_device", whole(1), 1, 8, "which hosts share a node is found out, not configured"),
]


def shards(values: Values) -> int:
    """Hosts that share each expert."""
    given: int | None = values["expert_model_parallel"]
    return values["model_parallel"] if given is None else given


def _hosts(values: Values) -> dict[str, Any]:
    return {"placement.num_hosts": values["expert_parallel"] * shards(values), "placement.tensor_parallel": shards(values)}


_PLACEMENT_PARAMS = [
    Param(
        "expert_model_parallel",
        optional(whole(1)),
        None,
        [
            Case(
                "effect",
                "`placement.tensor_parallel`, `placement.num_hosts` = expert_parallel * expert_model_parallel",
                2,
                "an integer",
                lambda v: v["expert_model_parallel"] is not None,
                _hosts,
            ),
            Case(
                "note",
                "experts are split as the rest of the model, by model_parallel",
                None,
                "null",
                lambda v: v["expert_model_parallel"] is None,
            ),
        ],
    ),
    Param(
        "model_parallel",
        whole(1),
        1,
        [
            Case(
                "effect",
                "`placement.tensor_parallel`, `placement.num_hosts` = expert_parallel * model_parallel",
                2,
                "with expert_model_parallel null",
                lambda v: v["expert_model_parallel"] is None,
                _hosts,
            ),
            Case(
                "effect",
                "`layers.gating.capacity_multiple`, times comp_comm_parallel_degree where there is comp_comm_parallel",
                2,
                "with V2",
                is_v2,
                capacity_multiple,
                V2,
            ),
            Case(
                "note",
                "expert_model_parallel splits experts instead",
                2,
                "with expert_model_parallel and V1",
                lambda v: v["expert_model_parallel"] is not None and is_v1(v),
                beside={"expert_model_parallel": 1},
            ),
        ],
    ),
    Param(
        "expert_parallel",
        whole(1),
        1,
        [Case("effect", "`placement.num_hosts`, times the hosts that share each expert", 4, sets=_hosts)],
    ),
]

_OTHER_PARAMS = [
    noted("max_router_load", whole(1), 128 * 1024, 1024, "the size of a buffer; a batch here is as large as `batching.max_batch_tokens`"),
    noted(
        "first_k_dense_replace",
        Accepts("true, false or an integer", lambda v: type(v) in (bool, int)),
        True,
        1,
        "which layers of the model are dense; the imported configuration is one MoE layer",
    ),
    noted("topk_bias_update_rate", real(minimum=0), 0.0, 0.001, _TRAINING),
    noted("moe_init_method_std", real(above=0), 0.01, 0.02, _TRAINING),
    noted("save_token_distribution", FLAG, False, True, "`moeserve_expert_tokens_total` always counts tokens per expert"),
    noted("callback_moe_droprate", FLAG, False, True, "`moeserve_expert_dropped_tokens_total` always counts drops"),
    noted("cur_layer", whole(0), 0, 3, "a number in the name of a record"),
    noted("use_fused_ops_topkrouter", FLAG, False, True, _KERNELS),
    noted("use_fused_ops_permute", FLAG, False, True, _KERNELS),
    noted("enable_gmm_safe_tokens", FLAG, False, True, _KERNELS),
]

EXECUTION_PARAMS = [*_EXPERT_PARAMS, *_COMMUNICATION_PARAMS, *_OTHER_PARAMS, *_PLACEMENT_PARAMS]
