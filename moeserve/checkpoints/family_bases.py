"""What families share: the names of their tensors, and the families that others descend from."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moeserve.checkpoints import gates, rules
from moeserve.checkpoints.family import Family, Layout
from moeserve.checkpoints.layouts import Separate, Stacked

MLP: Final = "model.layers.{index}.mlp"
FEED_FORWARD: Final = "model.layers.{index}.feed_forward"
BLOCK_SPARSE: Final = "model.layers.{index}.block_sparse_moe"
W123: Final = Separate("experts.{expert}.w1.weight", "experts.{expert}.w3.weight", "experts.{expert}.w2.weight")
SHARED_W123: Final = ("w1", "w3", "w2")


def both(layout: Layout) -> tuple[Layout, Layout]:
    """One tensor per expert, as published; stacked, as transformers holds them."""
    return layout, replace(layout, experts=Stacked())


PLAIN: Final = both(Layout(MLP))
WITH_BIAS: Final = both(Layout(MLP, score_correction_bias="gate.e_score_correction_bias"))
ONE_SHARED: Final = both(Layout(MLP, shared_expert="shared_expert"))
MIXTRAL: Final = (*PLAIN, *both(Layout(BLOCK_SPARSE, W123)))
GRANITE: Final = (
    Layout(BLOCK_SPARSE, Stacked("input_linear.weight", "output_linear.weight"), router="router.layer.weight"),
    Layout(BLOCK_SPARSE, Stacked(), router="router.weight"),
)

MIXTRAL_FAMILY: Final = Family(
    MIXTRAL, gates.renormalized, intermediate_size=("intermediate_size",), num_experts=("num_local_experts", "num_experts")
)
QWEN3: Final = Family(PLAIN, gates.renormalized_if_told(False), rules.sparse_step)
QWEN_SHARED: Final = Family(
    ONE_SHARED, gates.renormalized_if_told(False), rules.sparse_step, shared_size=rules.of_its_own, shared_mixing="sigmoid"
)
DEEPSEEK_V3: Final = Family(
    WITH_BIAS,
    gates.deepseek_v3(routed_scaling_factor=2.5),
    rules.after_dense(3),
    shared_size=rules.times_expert("n_shared_experts", 1),
    num_experts=("n_routed_experts", "num_local_experts", "num_experts"),
)
GRANITE_FAMILY: Final = Family(
    GRANITE,
    gates.chosen_logits,
    intermediate_size=("intermediate_size",),
    num_experts=("num_local_experts",),
    # Of the MLP beside the block.
    unrelated=("shared_intermediate_size",),
    layer_name=BLOCK_SPARSE,
)
