"""DeepSeek's families and those that took over their gate: a selection bias, groups of experts, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from moeserve.checkpoints import gates, rules
from moeserve.checkpoints.family import Family, Layout, every_layer, hidden_act, no_shared_expert
from moeserve.checkpoints.family_bases import BLOCK_SPARSE, DEEPSEEK_V3, MLP, PLAIN, SHARED_W123, W123, WITH_BIAS, both
from moeserve.checkpoints.layouts import Separate, Stacked

#: keys of Kimi-Linear and Ling 2.5 -> what the others call them
_RENAMED: Final[Mapping[str, str]] = {
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
_DEEPSEEK_V2: Final = replace(
    DEEPSEEK_V3,
    layouts=PLAIN,
    gating=gates.deepseek_v2,
    is_moe_layer=rules.after_dense(0),
    shared_size=rules.times_expert("n_shared_experts", 2),
    shared_bias="mlp_bias",
)

#: Kimi-K2.5 is a DeepSeek-V3 whose layers are called blocks when transformers saves it
_IN_KIMI: Final = replace(
    DEEPSEEK_V3, layouts=(*WITH_BIAS, Layout("model.blocks.{index}.mlp", score_correction_bias="gate.e_score_correction_bias"))
)

DEEPSEEK_FAMILIES: Final[Mapping[str, Family]] = {
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _IN_KIMI,
    "deepseek_v32": replace(DEEPSEEK_V3, is_moe_layer=rules.of_kind(3), shared_bias="mlp_bias"),
    "glm4_moe": replace(DEEPSEEK_V3, gating=gates.deepseek_v3(), is_moe_layer=rules.after_dense(1)),
    "glm4_moe_lite": replace(DEEPSEEK_V3, gating=gates.deepseek_v3(routed_scaling_factor=1.8), is_moe_layer=rules.of_kind(1)),
    "dots1": replace(DEEPSEEK_V3, gating=gates.deepseek_v3(norm_topk_prob=False), is_moe_layer=rules.after_dense(0)),
    "solar_open": replace(DEEPSEEK_V3, gating=gates.deepseek_v3(), is_moe_layer=every_layer),
    "exaone_moe": replace(
        DEEPSEEK_V3,
        layouts=(*WITH_BIAS, *both(Layout(MLP, score_correction_bias="e_score_correction_bias"))),
        gating=gates.deepseek_v3(routed_scaling_factor=2.5),
        is_moe_layer=rules.of_kind(1),
        shared_size=rules.times_expert("num_shared_experts", 1),
        num_experts=("num_experts",),
    ),
    "deepseek_ocr2": replace(_DEEPSEEK_V2, is_moe_layer=rules.of_kind(0)),
    "unlimited_ocr": replace(_DEEPSEEK_V2, is_moe_layer=rules.of_kind(1)),
    "kimi_k2": _IN_KIMI,
    "kimi_k25": _IN_KIMI,
    "kimi_linear": replace(
        DEEPSEEK_V3,
        layouts=(*both(Layout(BLOCK_SPARSE, W123, score_correction_bias="gate.e_score_correction_bias")), *WITH_BIAS),
        gating=gates.deepseek_v3(routed_scaling_factor=2.446),
        is_moe_layer=rules.of_kind(1),
        aliases=_RENAMED,
    ),
    "bailing_hybrid": replace(
        DEEPSEEK_V3,
        layouts=(*both(Layout(MLP, score_correction_bias="gate.expert_bias")), *WITH_BIAS),
        is_moe_layer=rules.of_kind(2),
        aliases=_RENAMED,
    ),
    "bailing_moe": Family(
        (*both(Layout(MLP, score_correction_bias="gate.expert_bias")), *PLAIN),
        gates.bailing,
        rules.after_dense(0),
        shared_size=rules.times_expert("num_shared_experts", 0),
    ),
    "glm4v_moe": replace(DEEPSEEK_V3, gating=gates.deepseek_v3(), is_moe_layer=rules.after_dense(1)),
    "glm_moe_dsa": replace(DEEPSEEK_V3, gating=gates.deepseek_v3(routed_scaling_factor=2.5), is_moe_layer=rules.of_kind(3)),
    "axk1": replace(DEEPSEEK_V3, is_moe_layer=rules.of_kind(1)),
    "axk2": replace(DEEPSEEK_V3, gating=gates.axk2, is_moe_layer=rules.of_kind(1)),
    "dots3_note": replace(
        DEEPSEEK_V3,
        gating=gates.deepseek_v3(),
        is_moe_layer=rules.of_kind(1),
        shared_size=rules.dots3_shared,
    ),
    "beam": replace(DEEPSEEK_V3, is_moe_layer=rules.of_kind(3), shared_size=no_shared_expert),
    "mimo_v2_flash": replace(DEEPSEEK_V3, gating=gates.mimo, is_moe_layer=rules.of_kind(1), shared_size=no_shared_expert),
    "hy_v3": replace(
        DEEPSEEK_V3,
        layouts=(
            Layout(MLP, router="router.gate.weight", score_correction_bias="expert_bias", shared_expert="shared_mlp"),
            *both(Layout(MLP, score_correction_bias="e_score_correction_bias")),
        ),
        gating=gates.hy_v3,
        is_moe_layer=rules.of_kind(1),
        shared_size=rules.times_expert("num_shared_experts", 1),
        num_experts=("num_experts", "num_local_experts"),
    ),
    "mistral4": replace(DEEPSEEK_V3, layouts=PLAIN, gating=gates.mistral4, is_moe_layer=rules.after_dense(0)),
    "mistral_large4": replace(
        DEEPSEEK_V3,
        layouts=(Layout("model.layers.{index}", W123, shared_names=SHARED_W123, beside=("experts", "gate", "shared_experts")), *PLAIN),
        gating=gates.mistral_large4,
        is_moe_layer=rules.of_kind(1),
    ),
    "hy_v4": replace(
        DEEPSEEK_V3,
        # The last is as transformers 5 saves it, which takes the shared expert's gate for one of attention.
        layouts=(*WITH_BIAS, replace(WITH_BIAS[1], shared_names=("linear_gate", "up_proj", "down_proj"))),
        gating=gates.deepseek_v3(routed_scaling_factor=2.827),
        is_moe_layer=rules.of_kind(1),
        activation=rules.limited("swiglu", 10.0),
        shared_activation=hidden_act,
    ),
    "glm5_next": replace(
        DEEPSEEK_V3,
        gating=gates.deepseek_v3(routed_scaling_factor=2.5),
        is_moe_layer=rules.of_kind(3),
        activation=rules.limited("swiglu", 10.0),
    ),
    "deepseek_v4": Family(
        (
            *both(Layout(MLP, score_correction_bias="gate.e_score_correction_bias", expert_table="gate.tid2eid")),
            Layout(
                "model.layers.{index}.ffn",
                W123,
                score_correction_bias="gate.bias",
                expert_table="gate.tid2eid",
                shared_names=SHARED_W123,
            ),
        ),
        gates.deepseek_v4,
        activation=rules.limited("swiglu", 10.0),
        shared_size=rules.times_expert("n_shared_experts", 1),
        shared_bias="mlp_bias",
        of_layer=rules.hash_layers,
        num_experts=("n_routed_experts", "num_local_experts"),
    ),
    "nemotron_h": replace(
        DEEPSEEK_V3,
        layouts=tuple(
            Layout(
                f"{model}.layers.{{index}}.mixer",
                experts,
                score_correction_bias="gate.e_score_correction_bias",
                shared_names=("", "up_proj", "down_proj"),
            )
            for model in ("model", "backbone")
            for experts in (
                Separate("", "experts.{expert}.up_proj.weight", "experts.{expert}.down_proj.weight"),
                Stacked("experts.up_proj", gated=False),
            )
        ),
        gating=gates.nemotron,
        is_moe_layer=rules.nemotron,
        activation=rules.by_activation_key("mlp_hidden_act", "relu2", {"relu2": "relu2", "relu": "relu", "gelu": "gelu"}),
        shared_size=rules.by_key("moe_shared_expert_intermediate_size"),
        shared_bias="mlp_bias",
        unrelated=("n_shared_experts", "hidden_act"),
        layers_named_by=("layers_block_type", "hybrid_override_pattern"),
        hidden_size=("moe_latent_size", "hidden_size"),
        layer_name="model.layers.{index}.mixer",
    ),
}
