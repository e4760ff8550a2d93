"""Newer families, each with something of its own between gate and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from moeserve.checkpoints import gates, rules
from moeserve.checkpoints.family import Family, Layout
from moeserve.checkpoints.family_bases import BLOCK_SPARSE, MLP, PLAIN, W123, WITH_BIAS, both
from moeserve.checkpoints.layouts import Separate, Stacked, Stacks

_DECODER: Final = "model.layers.{index}"

NEWER_FAMILIES: Final[Mapping[str, Family]] = {
    "minimax_m3_vl": Family(
        (
            Layout(BLOCK_SPARSE, W123, score_correction_bias="e_score_correction_bias"),
            *(
                Layout(MLP, experts, score_correction_bias="gate.e_score_correction_bias", shared_names=("gate_up_proj", "down_proj"))
                for experts in (W123, Stacked())
            ),
        ),
        gates.minimax_m3,
        rules.of_kind(0),
        activation=rules.gpt_oss_activation,
        shared_size=rules.by_key("shared_intermediate_size"),
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "step3p5": Family(
        (
            Layout(
                _DECODER,
                Stacks("moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight"),
                router="moe.gate.weight",
                score_correction_bias="moe.router_bias",
                shared_expert="share_expert",
                beside=("moe", "share_expert"),
            ),
            *WITH_BIAS,
        ),
        gates.step,
        rules.step,
        activation=rules.step_activation("swiglu_limit"),
        shared_activation=rules.step_activation("swiglu_limit_shared"),
        shared_size=rules.by_key("share_expert_dim"),
        of_layer=rules.step_layer,
        aliases={"share_expert_dims": "share_expert_dim"},
        num_experts=("n_routed_experts", "moe_num_experts", "num_local_experts"),
        num_experts_per_tok=("num_experts_per_tok", "moe_top_k"),
    ),
    "openai_privacy_filter": Family(
        (Layout(MLP, Stacked(transposed=True), router="router.weight", router_bias="router.bias"),),
        gates.chosen_logits,
        activation=rules.gpt_oss_activation,
        bias=True,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "cohere2_moe": Family(
        PLAIN,
        gates.cohere2,
        rules.of_kind(0),
        shared_size=rules.times_dense("num_shared_experts"),
        shared_mixing=rules.cohere2_mixing,
        intermediate_size=("intermediate_size",),
    ),
    "kolibri1": Family(
        (
            *both(
                Layout(
                    _DECODER,
                    Separate(*(f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down"))),
                    router="mlp.gate.weight",
                    score_correction_bias="moe.router.expert_bias",
                    shared_expert="mlp.shared_experts",
                    beside=("mlp", "moe"),
                )
            )[:1],
            *WITH_BIAS,
        ),
        gates.kolibri,
        shared_size=rules.of_its_own,
    ),
    "laguna": Family(
        (
            Layout(MLP, score_correction_bias="experts.e_score_correction_bias", shared_expert="shared_expert"),
            *WITH_BIAS,
        ),
        gates.laguna,
        rules.of_kind(1),
        shared_size=rules.of_its_own,
    ),
    "aria": Family(
        tuple(
            Layout(MLP, Stacked(*names, transposed=True), router="router.weight")
            for names in (("experts.fc1.weight", "experts.fc2.weight"), ("experts.gate_up_proj", "experts.down_proj"))
        ),
        gates.chosen_logits,
        activation=rules.silu,
        shared_size=rules.times_dense("moe_num_shared_experts"),
        shared_bias="mlp_bias",
        intermediate_size=("intermediate_size",),
        num_experts=("moe_num_experts",),
        num_experts_per_tok=("moe_topk",),
    ),
    "gemma4": Family(
        (Layout(_DECODER, Stacked(), router="router.proj.weight", beside=("experts", "router")),),
        gates.caller,
        rules.gemma4,
        activation=rules.by_activation_key("hidden_activation", "gelu_pytorch_tanh"),
        num_experts_per_tok=("top_k_experts",),
        layer_name=_DECODER,
    ),
    "inkling": Family(
        (Layout(MLP, Stacked("experts.w13_weight", "experts.w2_weight", interleaved=True)), Layout(MLP, Stacked())),
        gates.caller,
        rules.inkling,
        of_layer=rules.inkling_layer,
        num_experts=("n_routed_experts",),
    ),
    "zaya": Family((Layout(MLP, Stacked(), router="gate.down_proj.weight"),), gates.caller),
}
