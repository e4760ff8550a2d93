"""The model families: one table entry each, and those that other packages add. See docs/models.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from moeserve.checkpoints import gates, rules
from moeserve.checkpoints.deepseek_families import DEEPSEEK_FAMILIES
from moeserve.checkpoints.family import Family, Layout, every_layer
from moeserve.checkpoints.family_bases import (
    BLOCK_SPARSE,
    FEED_FORWARD,
    GRANITE,
    GRANITE_FAMILY,
    MIXTRAL_FAMILY,
    MLP,
    PLAIN,
    QWEN3,
    QWEN_SHARED,
    W123,
    both,
)
from moeserve.checkpoints.layouts import Flat, Stacked
from moeserve.checkpoints.newer_families import NEWER_FAMILIES

#: the group of entry points that other packages add families with: name = model_type, value = "package.module:FAMILY"
ENTRY_POINTS: Final = "moeserve.families"

#: by model_type, without the "_text" that some language models inside a wrapper have at its end
FAMILIES: Final[Mapping[str, Family]] = {
    **DEEPSEEK_FAMILIES,
    "mixtral": MIXTRAL_FAMILY,
    "minimax": MIXTRAL_FAMILY,
    "minimax_m1": MIXTRAL_FAMILY,
    "minimax_m2": Family(
        (
            *both(Layout(BLOCK_SPARSE, W123, score_correction_bias="e_score_correction_bias")),
            *both(Layout(MLP, score_correction_bias="e_score_correction_bias")),
        ),
        gates.minimax_m2,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "phimoe": Family(
        (*both(Layout(BLOCK_SPARSE, W123)), *both(Layout(MLP, router="router.weight"))),
        gates.phimoe,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "olmoe": Family(PLAIN, gates.renormalized_if_told(False), intermediate_size=("intermediate_size",)),
    "flex_olmo": Family(PLAIN, gates.renormalized_if_told(False), intermediate_size=("intermediate_size",)),
    "qwen2_moe": QWEN_SHARED,
    "qwen3_moe": QWEN3,
    "qwen3_next": replace(QWEN_SHARED, gating=gates.renormalized_if_told(True)),
    "qwen3_5_moe": replace(QWEN_SHARED, gating=gates.renormalized, is_moe_layer=every_layer),
    "qwen4_exp": replace(QWEN_SHARED, gating=gates.renormalized_if_told(True), is_moe_layer=every_layer),
    "qwen3_omni_moe": replace(QWEN3, gating=gates.renormalized_if_told(True)),
    # As published a stack is [E, H, 2I]; transformers holds [E, 2I, H] under the same name.
    "qwen3_vl_moe": replace(QWEN3, layouts=(Layout(MLP, Stacked(transposed=None)), Layout(MLP)), gating=gates.renormalized),
    "flint": replace(QWEN_SHARED, gating=gates.flint, is_moe_layer=rules.flint, shared_mixing="add"),
    "mellum": replace(QWEN3, gating=gates.renormalized_if_told(True), is_moe_layer=rules.of_kind(0)),
    "afmoe": Family(
        both(Layout(MLP, router="router.gate.weight", score_correction_bias="expert_bias")),
        gates.afmoe,
        rules.after_dense(1, "num_dense_layers"),
        shared_size=rules.times_expert("num_shared_experts", 2),
        num_experts=("num_experts",),
    ),
    "gpt_oss": Family(
        tuple(
            Layout(MLP, experts, router="router.weight", router_bias="router.bias")
            for experts in (
                Stacked("experts.gate_up_proj_blocks", "experts.down_proj_blocks", interleaved=True),
                Stacked(transposed=True, interleaved=True),
            )
        ),
        gates.chosen_logits,
        activation=rules.gpt_oss_activation,
        bias=True,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "granitemoe": GRANITE_FAMILY,
    "granitemoeshared": GRANITE_FAMILY,
    "granitemoehybrid": GRANITE_FAMILY,
    "granitemoe_swa": replace(GRANITE_FAMILY, layouts=(GRANITE[1], GRANITE[0])),
    "jamba": Family(
        both(Layout(FEED_FORWARD, router="router.weight")),
        gates.plain,
        rules.jamba,
        intermediate_size=("intermediate_size",),
        layer_name=FEED_FORWARD,
    ),
    "lfm2_moe": Family(
        both(Layout(FEED_FORWARD, W123, score_correction_bias="expert_bias")),
        gates.lfm2,
        rules.after_dense(2, "num_dense_layers"),
        num_experts=("num_experts",),
        layer_name=FEED_FORWARD,
    ),
    "dbrx": Family(
        (
            Layout(
                "transformer.blocks.{index}.ffn",
                Flat("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"),
                router="router.layer.weight",
            ),
        ),
        gates.dbrx,
        activation=rules.dbrx_activation,
        num_hidden_layers=("n_layers", "num_hidden_layers"),
        hidden_size=("d_model", "hidden_size"),
        intermediate_size=("ffn_config.ffn_hidden_size",),
        num_experts=("ffn_config.moe_num_experts",),
        num_experts_per_tok=("ffn_config.moe_top_k",),
        layer_name="transformer.blocks.{index}.ffn",
    ),
    "llama4": Family(
        (Layout(FEED_FORWARD, Stacked(transposed=True), router="router.weight", shared_expert="shared_expert"),),
        gates.llama4,
        rules.every_nth,
        shared_size=rules.like_the_others,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts",),
        layer_name=FEED_FORWARD,
    ),
    "ernie4_5_moe": Family(
        both(Layout(MLP, score_correction_bias="moe_statics.e_score_correction_bias")),
        gates.ernie,
        rules.ernie,
        shared_size=rules.times_expert("moe_num_shared_experts", 2),
        shared_bias="use_bias",
        num_experts=("moe_num_experts", "num_experts"),
        num_experts_per_tok=("moe_k", "num_experts_per_tok"),
    ),
    "hunyuan_v1_moe": Family(
        both(Layout(MLP, router="gate.wg.weight", shared_expert="shared_mlp")),
        gates.renormalized,
        shared_size=rules.like_the_others,
        intermediate_size=("intermediate_size",),
        num_experts=("num_experts", "num_local_experts"),
        num_experts_per_tok=("moe_topk", "num_experts_per_tok"),
    ),
    "longcat_flash": Family(
        (
            Layout(
                MLP,
                router="router.classifier.weight",
                router_bias="router.classifier.bias",
                score_correction_bias="router.e_score_correction_bias",
            ),
        ),
        gates.longcat,
        num_hidden_layers=("num_layers",),
        intermediate_size=("expert_ffn_hidden_size", "moe_intermediate_size"),
        num_experts=("n_routed_experts", "num_local_experts"),
        num_experts_per_tok=("moe_topk", "num_experts_per_tok"),
        identity_experts="zero_expert_num",
    ),
    **NEWER_FAMILIES,
}


def supported() -> list[str]:
    """All model types, ours and added ones."""
    return sorted({*FAMILIES, *_added()})


def is_known(model_type: str) -> bool:
    """Whether some family, here or in another package, serves this `model_type`."""
    return not {model_type, model_type.removesuffix("_text")}.isdisjoint({*FAMILIES, *_added()})


def family_of(model_type: str) -> Family:
    """The entry of a known model type, ours or an added one. Raises ValueError for an added one that cannot be used."""
    names, added = (model_type, model_type.removesuffix("_text")), _added()
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    point = next(added[name] for name in names if name in added)
    try:
        family = point.load()
    except Exception as error:
        # Whatever goes wrong while the code of others is imported.
        raise ValueError(f"model_type is {model_type}, and its entry point {point.value!r} cannot be imported: {error}") from None
    if not isinstance(family, Family):
        raise ValueError(f"model_type is {model_type}, and its entry point {point.value!r} is not a moeserve.checkpoints.Family")
    return family


def _added() -> Mapping[str, EntryPoint]:
    return _added_on(tuple(sys.path))


@cache
def _added_on(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Kept, because every installed distribution is looked into: milliseconds, and several times for a checkpoint."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
