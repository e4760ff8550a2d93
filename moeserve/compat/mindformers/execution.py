"""What the parameters of MindFormers' `MoEConfig` that say how experts are kept, reached and computed mean here."""

from __future__ import annotations

from dataclasses import replace

from moeserve.compat.accepts import FLAG, TEXT, Accepts, Values, one_of, optional, real, whole
from moeserve.compat.mindformers.capacity import CAPACITY_MULTIPLE
from moeserve.compat.mindformers.routers import V2
from moeserve.compat.table import OTHERWISE, Computed, Param, When, effect, given, note, notes, refusal

_BOOL_OR_WHOLE = Accepts("true, false or an integer", lambda value: type(value) in (bool, int), (1, 2))
_SHARED = {
    "layers.shared_expert.intermediate_size": Computed(
        lambda v: v["shared_expert_num"] * v["moe_intermediate_size"], "shared_expert_num * moe_intermediate_size"
    ),
    "layers.shared_expert.mixing": Computed(
        lambda v: "sigmoid" if v["use_shared_expert_gating"] else "add", "`sigmoid` with use_shared_expert_gating, else `add`"
    ),
}
_HAS_SHARED = When("with shared_expert_num above 0", lambda v: v["shared_expert_num"] > 0, {"shared_expert_num": 1})

_EXPERT_PARAMS = [
    Param("shared_expert_num", whole(0), 0).means(
        note("there are no shared experts", on=0),
        effect(_SHARED, "the shared experts side by side", when=OTHERWISE),
    ),
    Param("use_shared_expert_gating", FLAG, False).means(
        effect(_SHARED, when=_HAS_SHARED),
        note("there is no shared expert", when=OTHERWISE),
    ),
    *notes(
        "orders work and does not change answers: a host computes the shared expert with the others",
        Param("moe_shared_expert_overlap", FLAG, False),
    ),
    Param("enable_cold_hot_expert", FLAG, False).means(
        refusal(
            "not supported: cold experts cannot have a smaller capacity than hot ones, and answers would differ",
            on=True,
            when=When("with cold_token_percent below 1", lambda v: v["cold_token_percent"] < 1, {"cold_token_percent": 0.5}),
        ),
        note(
            "not imported: MindFormers measures in training which experts are hot; here `[balancing]` does while serving, and "
            "`placement.copies` takes them by number; answers are the same",
            when=OTHERWISE,
        ),
    ),
    *notes(
        "only enable_cold_hot_expert reads it",
        Param("hot_expert_num", whole(0), 0),
        Param("cold_token_percent", real(above=0, maximum=1), 1.0),
        Param("update_step", whole(1), 10000),
        Param("moe_module_name", TEXT, ""),
    ),
    *notes(
        "the gate always computes in float32; so does MindFormers for 'float16'",
        Param("router_dense_type", one_of("float32", "float16", "bfloat16"), "float32"),
    ),
]


def _per_node(name: str) -> Param:
    return Param(name, FLAG, False).means(
        effect({"communication.pattern": "hierarchical"}, "one message per node, which passes it on", on=True),
        note("every host gets a message of its own", on=False),
    )


_COMMUNICATION_PARAMS = [
    _per_node("group_wise_a2a"),
    *notes("chooses how tensors travel and does not change answers", Param("use_allgather_dispatcher", FLAG, False)),
    _per_node("enable_deredundency"),
    *notes("which hosts share a node is detected, not configured", Param("npu_nums_per_device", whole(1), 1)),
]

_OTHER_PARAMS = [
    *notes("the size of a buffer; here `batching.max_batch_tokens` limits a batch", Param("max_router_load", whole(1), 128 * 1024)),
    *notes(
        "which layers of the model are dense; the imported configuration is one MoE layer",
        Param("first_k_dense_replace", _BOOL_OR_WHOLE, True),
    ),
    *notes(
        "belongs to training: no effect on inference",
        Param("topk_bias_update_rate", real(minimum=0), 0.0),
        Param("moe_init_method_std", real(above=0), 0.01),
    ),
    *notes("`moeserve_expert_tokens_total` always counts tokens per expert", Param("save_token_distribution", FLAG, False)),
    *notes("`moeserve_expert_dropped_tokens_total` always counts drops", Param("callback_moe_droprate", FLAG, False)),
    *notes("a number in the name of a record", Param("cur_layer", whole(0), 0)),
    *notes(
        "selects kernels and does not change answers",
        Param("use_fused_ops_topkrouter", FLAG, False),
        Param("use_fused_ops_permute", FLAG, False),
        Param("enable_gmm_safe_tokens", FLAG, False),
    ),
]


def _shards(values: Values) -> int:
    """Hosts that share each expert."""
    given: int | None = values["expert_model_parallel"]
    return values["model_parallel"] if given is None else given


_HOSTS = {
    "placement.tensor_parallel": Computed(_shards, "expert_model_parallel, or else model_parallel"),
    "placement.num_hosts": Computed(lambda v: v["expert_parallel"] * _shards(v), "expert_parallel * `tensor_parallel`"),
}

_PLACEMENT_PARAMS = [
    Param("expert_model_parallel", optional(whole(1)), None).means(
        note("experts are split as the rest of the model, by model_parallel", on=None),
        effect(_HOSTS, when=OTHERWISE),
    ),
    Param("model_parallel", whole(1), 1).means(
        effect(_HOSTS, when=given(expert_model_parallel=None)),
        effect(CAPACITY_MULTIPLE, when=V2),
        note(
            "expert_model_parallel splits experts instead",
            when=replace(OTHERWISE, at="with expert_model_parallel and V1", beside={"expert_model_parallel": 1}),
        ),
    ),
    Param("expert_parallel", whole(1), 1).means(effect(_HOSTS)),
]

EXECUTION_PARAMS = [*_EXPERT_PARAMS, *_COMMUNICATION_PARAMS, *_OTHER_PARAMS, *_PLACEMENT_PARAMS]
