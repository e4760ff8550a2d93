"""Every routing inside a layer: the answer is that of the same choices made by the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moeserve import ConfigError, GatingConfig, InvalidRequest, MoELayer, route
from tests.support.closeness import assert_close

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}


@pytest.mark.parametrize(
    "knobs",
    [
        {"scoring_func": "sigmoid", "num_expert_groups": 4, "topk_groups": 2, "group_score": "top2_sum", "renormalize": "pre_drop"},
        {"scoring_func": "softmax_topk"},
        {"scoring_func": "sqrt_softplus", "routed_scaling_factor": 2.5},
        {"routing": "expert_choice", "capacity_factor": 1.0},
        {"routing": "hash"},
        {"routing": "random", "seed": 1},
        {"routing": "least_loaded"},
        {"routing": "similarity"},
        {"routing": "mindformers", "capacity_factor": 0.5, "renormalize": "post_drop", "renormalize_eps": 1e-9},
        {"routing": "sparsemixer"},
        {"noise": "rsample", "seed": 1},
        {"drop_policy": "random", "seed": 1, "capacity_factor": 0.5},
    ],
    ids=str,
)
def test_a_layer_computes_what_the_gate_decided(knobs: dict[str, Any]) -> None:
    gating = GatingConfig(**knobs)
    layer, chooser = MoELayer(**SIZES, gating=gating), MoELayer(**SIZES)
    hidden_states = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    token_ids = torch.arange(12)
    got = layer.run(hidden_states, token_ids=token_ids, return_routing=True)
    logits = F.linear(hidden_states, layer.router.gate)
    routing = route(logits, gating, token_ids=token_ids, hidden_states=hidden_states, centroids=layer.router.gate)
    assert got.topk_ids is not None
    assert torch.equal(got.topk_ids, routing.topk_ids)
    everyone = torch.arange(8).repeat(12, 1)
    want = chooser.run(hidden_states, topk_ids=everyone, topk_weights=routing.dense())
    assert_close(got.hidden_states, want.hidden_states)
    assert torch.equal(got.processed, routing.processed)
    assert torch.equal(got.dropped, routing.dropped)


def test_what_a_layer_cannot_do_is_said_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="num_expert_groups is 3, which does not divide the layer's 8 experts"):
        MoELayer(**SIZES, gating=GatingConfig(num_expert_groups=3, topk_groups=1))
    with pytest.raises(ConfigError, match="cannot be imported"):
        MoELayer(**SIZES, gating=GatingConfig(routing="no_such_module:Class"))
    with pytest.raises(InvalidRequest, match="token_ids is required"):
        MoELayer(**SIZES, gating=GatingConfig(routing="hash")).run(torch.zeros(2, 16))
