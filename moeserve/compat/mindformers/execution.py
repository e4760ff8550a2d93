"""What the parameters of MindFormers' `MoEConfig` that say how experts are kept, reached and computed mean here."""

from __future__ import annotations

from moeserve.compat.table import FLAG, TEXT, Accepts, Case, Param, noted, one_of, optional, real, whole

_TRAINING = "belongs to training: no effect on inference"
_KERNELS = "chooses kernels, not answers"
_NO_SHARED = "there is no shared expert for it to act on"

_EXPERT_PARAMS = [
    Param(
        "shared_expert_num",
        whole(0),
        0,
        [
            Case(
                "refusal",
                "not supported: a served layer has no shared experts, and without them every answer would differ",
                1,
                "above 0",
                lambda v: v["shared_expert_num"] > 0,
            ),
            Case("note", "no shared experts, here and there", 0, "0", lambda v: v["shared_expert_num"] == 0),
        ],
    ),
    noted("use_shared_expert_gating", FLAG, False, True, _NO_SHARED),
    noted("moe_shared_expert_overlap", FLAG, False, True, _NO_SHARED),
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
                "not supported: hot experts are not copied to every host; answers are the same",
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

_COMMUNICATION_PARAMS = [
    noted("group_wise_a2a", FLAG, False, True, "not supported: one message goes to every host, not to every node; answers are the same"),
    noted("use_allgather_dispatcher", FLAG, False, True, "chooses how tensors travel, not answers"),
    noted(
        "enable_deredundency", FLAG, False, True, "not supported: one message goes to every host, not to every node; answers are the same"
    ),
    noted("npu_nums_per_device", whole(1), 1, 8, "only enable_deredundency reads it"),
    noted(
        "expert_model_parallel", optional(whole(1)), None, 2, "not supported: an expert lives on one host as a whole; answers are the same"
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

EXECUTION_PARAMS = [*_EXPERT_PARAMS, *_COMMUNICATION_PARAMS, *_OTHER_PARAMS]
