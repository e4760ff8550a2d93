"""Knobs that do not fit together are refused with one sentence that names them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from moeserve.config import GatingConfig


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"num_expert_groups": 4}, "gating.num_expert_groups and gating.topk_groups must be given together"),
        ({"topk_groups": 4}, "gating.num_expert_groups and gating.topk_groups must be given together"),
        ({"group_score": "top2_sum"}, "gating.group_score = 'top2_sum' needs gating.num_expert_groups"),
        ({"num_expert_groups": 2, "topk_groups": 3}, "gating.topk_groups is 3, more than gating.num_expert_groups = 2"),
        ({"num_expert_groups": 2, "topk_groups": 1, "routing": "hash"}, "gating.num_expert_groups limits learned routing only"),
        ({"routing": "hash", "scoring_func": "sigmoid"}, "gating.scoring_func = 'sigmoid' has no meaning with gating.routing = 'hash'"),
        ({"renormalize_eps": 1e-9}, "gating.renormalize_eps needs gating.renormalize"),
        ({"routing": "hash", "aux_loss": "mindformers"}, "gating.aux_loss = 'mindformers' is defined for rounds of choices"),
        ({"capacity_scope": "group"}, "gating.capacity_scope = 'group' and gating.expert_group_size must be given together"),
        ({"expert_group_size": 8}, "gating.capacity_scope = 'group' and gating.expert_group_size must be given together"),
        ({"capacity_rule": "trustformers", "min_capacity": 4}, "gating.min_capacity has no meaning with gating.capacity_rule"),
        ({"routing": "expert_choice"}, "gating.routing = 'expert_choice' needs gating.capacity_factor"),
        ({"routing": "expert_choice", "capacity_factor": 1.0, "drop_tokens": False}, "gating.drop_tokens = true"),
        ({"routing": "expert_choice", "capacity_factor": 1.0, "capacity_rule": "deepspeed"}, "gating.capacity_rule = 'deepspeed' has no"),
        ({"routing": "expert_choice", "capacity_factor": 1.0, "drop_policy": "probs"}, "gating.drop_policy = 'probs' has no meaning"),
        (
            {"routing": "expert_choice", "capacity_factor": 1.0, "scoring_func": "softmax_topk"},
            "gating.scoring_func = 'softmax_topk' needs choices of tokens",
        ),
        ({"routing": "mindformers", "drop_policy": "probs"}, "gating.drop_policy = 'probs' has no meaning"),
        ({"noise": "normal"}, "gating.seed is required with gating.noise = 'normal'"),
        ({"drop_policy": "random"}, "gating.seed is required with gating.drop_policy = 'random'"),
        ({"routing": "random"}, "gating.seed is required with gating.routing = 'random'"),
        ({"routing": "hash", "noise": "rsample", "seed": 0}, "gating.noise = 'rsample' acts on learned routing only"),
        (
            {"noise": "rsample", "seed": 0, "num_expert_groups": 2, "topk_groups": 1},
            "gating.noise = 'rsample' cannot be combined with gating.num_expert_groups",
        ),
        ({"noise": "gumbel_second", "seed": 0, "top_k": 3}, "gating.noise = 'gumbel_second' is about the second of two choices"),
        (
            {"noise": "normal", "seed": 0, "routing": "least_loaded"},
            "gating.noise = 'normal' has no meaning with gating.routing = 'least_loaded'",
        ),
        ({"noise_scale": 0.1}, "gating.noise_scale has no meaning with gating.noise = 'none'"),
        (
            {"drop_tokens": False, "request_overrides": ["capacity_factor"]},
            "gating.request_overrides cannot have 'capacity_factor' with gating.drop_tokens = false",
        ),
        ({"routing": "learnt"}, "gating.routing is 'learnt'; allowed: learned, expert_choice, hash"),
        ({"routing": "a b:C"}, "or a plug-in 'package.module:Class'"),
    ],
)
def test_impossible_combinations(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GatingConfig(**knobs)
    assert caught.value.error_count() == 1
    assert sentence in caught.value.errors()[0]["msg"]


def test_a_plug_in_is_named_by_its_import_path() -> None:
    assert GatingConfig(routing="my_package.routing:Mine").routing == "my_package.routing:Mine"


def test_a_configuration_survives_being_written_down() -> None:
    gating = GatingConfig(
        top_k=8, scoring_func="sigmoid", num_expert_groups=8, topk_groups=4, noise="normal", seed=3, request_overrides=("noise",)
    )
    assert GatingConfig.model_validate(gating.model_dump()) == gating
