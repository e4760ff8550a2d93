"""The model families: one table entry each, and those that other packages add. See docs/models.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Final

from moeserve.checkpoints import gates, rules
from moeserve.checkpoints.family import Family, Layout, every_layer
from moeserve.checkpoints.layouts import Flat, Separate, Stacked

#: the group of entry points that other packages add families with: name = model_type, value = "package.module:FAMILY"
ENTRY_POINTS: Final = "moeserve.families"

_MLP: Final = "model.layers.{index}.mlp"
_FEED_FORWARD: Final = "model.layers.{index}.feed_forward"
_BLOCK_SPARSE: Final = "model.layers.{index}.block_sparse_moe"
_W123: Final = Separate("experts.{expert}.w1.weight", "experts.{expert}.w3.weight", "experts.{expert}.w2.weight")


def _both(layout: Layout) -> tuple[Layout, Layout]:
    """One tensor per expert, as published; stacked, as transformers holds them."""
    return layout, replace(layout, experts=Stacked())


_PLAIN: Final = _both(Layout(_MLP))
_WITH_BIAS: Final = _both(Layout(_MLP, score_correction_bias="gate.e_score_correction_bias"))
_ONE_SHARED: Final = _both(Layout(_MLP, shared_expert="shared_expert"))
_MIXTRAL: Final = (*_PLAIN, *_both(Layout(_BLOCK_SPARSE, _W123)))
_GRANITE: Final = (
    Layout(_BLOCK_SPARSE, Stacked("input_linear.weight", "output_linear.weight"), router="router.layer.weight"),
    Layout(_BLOCK_SPARSE, Stacked(), router="router.weight"),
)

_MIXTRAL_FAMILY: Final = Family(
    _MIXTRAL, gates.renormalized, intermediate_size=("intermediate_size",), num_experts=("num_local_experts", "num_experts")
)
_QWEN3: Final = Family(_PLAIN, gates.renormalized_if_told(False), rules.sparse_step)
_QWEN_SHARED: Final = Family(
    _ONE_SHARED, gates.renormalized_if_told(False), rules.sparse_step, shared_size=rules.of_its_own, shared_mixing="sigmoid"
)
_QWEN35: Final = replace(
    _QWEN_SHARED,
    layouts=tuple(
        layout
        for model in ("model", "model.language_model")
        for layout in _both(Layout(f"{model}.layers.{{index}}.mlp", shared_expert="shared_expert"))
    ),
    gating=gates.renormalized,
    is_moe_layer=every_layer,
)
_DEEPSEEK_V3: Final = Family(
    _WITH_BIAS,
    gates.deepseek_v3(routed_scaling_factor=2.5),
    rules.after_dense(3),
    shared_size=rules.times_expert("n_shared_experts", 1),
    num_experts=("n_routed_experts", "num_local_experts", "num_experts"),
)
_GRANITE_FAMILY: Final = Family(
    _GRANITE,
    gates.chosen_logits,
    intermediate_size=("intermediate_size",),
    num_experts=("num_local_experts",),
    # Of the MLP beside the block.
    unrelated=("shared_intermediate_size",),
    layer_name=_BLOCK_SPARSE,
)
_LLAMA4: Final = Family(
    tuple(
        Layout(f"{model}{_FEED_FORWARD}", Stacked(transposed=True), router="router.weight", shared_expert="shared_expert")
        for model in ("", "language_model.")
    ),
    gates.llama4,
    rules.every_nth,
    shared_size=rules.like_the_others,
    intermediate_size=("intermediate_size",),
    num_experts=("num_local_experts",),
    layer_name=_FEED_FORWARD,
)

FAMILIES: Final[Mapping[str, Family]] = {
    "mixtral": _MIXTRAL_FAMILY,
    "minimax": _MIXTRAL_FAMILY,
    "minimax_m2": Family(
        (
            *_both(Layout(_BLOCK_SPARSE, _W123, score_correction_bias="e_score_correction_bias")),
            *_both(Layout(_MLP, score_correction_bias="e_score_correction_bias")),
        ),
        gates.minimax_m2,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "phimoe": Family(
        (*_both(Layout(_BLOCK_SPARSE, _W123)), *_both(Layout(_MLP, router="router.weight"))),
        gates.phimoe,
        intermediate_size=("intermediate_size",),
        num_experts=("num_local_experts", "num_experts"),
    ),
    "olmoe": Family(_PLAIN, gates.renormalized_if_told(False), intermediate_size=("intermediate_size",)),
    "flex_olmo": Family(_PLAIN, gates.renormalized_if_told(False), intermediate_size=("intermediate_size",)),
    "qwen2_moe": _QWEN_SHARED,
    "qwen3_moe": _QWEN3,
    "qwen3_next": replace(_QWEN_SHARED, gating=gates.renormalized_if_told(True)),
    "qwen3_5_moe": replace(_QWEN35, section="text_config"),
    "qwen3_5_moe_text": _QWEN35,
    "mellum": replace(_QWEN3, gating=gates.renormalized_if_told(True), is_moe_layer=rules.of_kind(0)),
    "deepseek_v2": replace(
        _DEEPSEEK_V3,
        layouts=_PLAIN,
        gating=gates.deepseek_v2,
        is_moe_layer=rules.after_dense(0),
        shared_size=rules.times_expert("n_shared_experts", 2),
        shared_bias="mlp_bias",
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": replace(_DEEPSEEK_V3, is_moe_layer=rules.of_kind(3), shared_bias="mlp_bias"),
    "glm4_moe": replace(_DEEPSEEK_V3, gating=gates.deepseek_v3(), is_moe_layer=rules.after_dense(1)),
    "glm4_moe_lite": replace(_DEEPSEEK_V3, gating=gates.deepseek_v3(routed_scaling_factor=1.8), is_moe_layer=rules.of_kind(1)),
    "dots1": replace(_DEEPSEEK_V3, gating=gates.deepseek_v3(norm_topk_prob=False), is_moe_layer=rules.after_dense(0)),
    "solar_open": replace(_DEEPSEEK_V3, gating=gates.deepseek_v3(), is_moe_layer=every_layer),
    "exaone_moe": replace(
        _DEEPSEEK_V3,
        layouts=(*_WITH_BIAS, *_both(Layout(_MLP, score_correction_bias="e_score_correction_bias"))),
        gating=gates.deepseek_v3(routed_scaling_factor=2.5),
        is_moe_layer=rules.of_kind(1),
        shared_size=rules.times_expert("num_shared_experts", 1),
        num_experts=("num_experts",),
    ),
    "afmoe": Family(
        _both(Layout(_MLP, router="router.gate.weight", score_correction_bias="expert_bias")),
        gates.afmoe,
        rules.after_dense(1, "num_dense_layers"),
        shared_size=rules.times_expert("num_shared_experts", 2),
        num_experts=("num_experts",),
    ),
    "gpt_oss": Family(
        tuple(
            Layout(_MLP, experts, router="router.weight", router_bias="router.bias")
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
    "granitemoe": _GRANITE_FAMILY,
    "granitemoeshared": _GRANITE_FAMILY,
    "granitemoehybrid": _GRANITE_FAMILY,
    "jamba": Family(
        _both(Layout(_FEED_FORWARD, router="router.weight")),
        gates.plain,
        rules.jamba,
        intermediate_size=("intermediate_size",),
        layer_name=_FEED_FORWARD,
    ),
    "lfm2_moe": Family(
        _both(Layout(_FEED_FORWARD, _W123, score_correction_bias="expert_bias")),
        gates.lfm2,
        rules.after_dense(2, "num_dense_layers"),
        num_experts=("num_experts",),
        layer_name=_FEED_FORWARD,
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
    "llama4_text": _LLAMA4,
    "llama4": replace(_LLAMA4, section="text_config"),
    "ernie4_5_moe": Family(
        _both(Layout(_MLP, score_correction_bias="moe_statics.e_score_correction_bias")),
        gates.ernie,
        rules.ernie,
        shared_size=rules.times_expert("moe_num_shared_experts", 2),
        shared_bias="use_bias",
        num_experts=("moe_num_experts", "num_experts"),
        num_experts_per_tok=("moe_k", "num_experts_per_tok"),
    ),
    "hunyuan_v1_moe": Family(
        _both(Layout(_MLP, router="gate.wg.weight", shared_expert="shared_mlp")),
        gates.renormalized,
        shared_size=rules.like_the_others,
        intermediate_size=("intermediate_size",),
        num_experts=("num_experts", "num_local_experts"),
        num_experts_per_tok=("moe_topk", "num_experts_per_tok"),
    ),
    "longcat_flash": Family(
        (
            Layout(
                _MLP,
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
}


def family_of(model_type: str) -> Family:
    """The entry of a model type, ours or an added one. Raises ValueError naming those there are."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    added = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if model_type not in added:
        raise ValueError(f"model_type is {model_type}; supported: {', '.join(sorted({*FAMILIES, *added}))}")
    point = added[model_type]
    try:
        family = point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model_type is {model_type}, and its entry point {point.value!r} cannot be imported: {error}") from None
    if not isinstance(family, Family):
        raise ValueError(f"model_type is {model_type}, and its entry point {point.value!r} is not a moeserve.checkpoints.Family")
    return family
