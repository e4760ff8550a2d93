"""What a request changes of its layer's gating is what the operator would have written, or is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moeserve.config import GatingConfig, GatingOverrides, override
from moeserve.errors import InvalidRequest

BOTH = ("capacity_factor", "noise")


@pytest.mark.parametrize(
    ("knobs", "overrides", "changed"),
    [
        ({}, {"capacity_factor": 1.25}, {"capacity_factor": 1.25}),
        ({"capacity_factor": 2.0, "drop_policy": "probs"}, {"capacity_factor": 0.5}, {"capacity_factor": 0.5}),
        ({"capacity_factor": 2.0}, {"capacity_factor": math.inf}, {"capacity_factor": None}),
        ({}, {"noise": "rsample", "seed": 7}, {"noise": "rsample", "seed": 7}),
        ({"seed": 3}, {"noise": "uniform"}, {"noise": "uniform"}),
        ({"noise": "jitter", "noise_scale": 0.3, "seed": 3}, {"seed": 4}, {"seed": 4}),
        ({"noise": "jitter", "noise_scale": 0.3, "seed": 3}, {"noise": "jitter", "seed": 4}, {"seed": 4}),
        ({"noise": "jitter", "noise_scale": 0.3, "seed": 3}, {"noise": "normal"}, {"noise": "normal", "noise_scale": None}),
        ({"noise": "jitter", "noise_scale": 0.3, "seed": 3}, {"noise": "none"}, {"noise": "none", "noise_scale": None}),
    ],
)
def test_an_override_is_the_key_of_that_name(knobs: dict[str, Any], overrides: dict[str, Any], changed: dict[str, Any]) -> None:
    gating = GatingConfig(**knobs, request_overrides=BOTH)
    assert override(gating, GatingOverrides(**overrides)) == GatingConfig(**{**knobs, **changed}, request_overrides=BOTH)


def test_nothing_overridden_is_the_gating_itself() -> None:
    gating = GatingConfig()
    assert override(gating, GatingOverrides()) is gating


def test_the_same_override_is_validated_once() -> None:
    gating = GatingConfig(request_overrides=BOTH)
    one, other = (override(GatingConfig(request_overrides=BOTH), GatingOverrides(capacity_factor=factor)) for factor in (1.5, 2.5))
    assert override(gating, GatingOverrides(capacity_factor=1.5)) is one
    assert override(gating, GatingOverrides(capacity_factor=2.5)) is other


@pytest.mark.parametrize(
    ("allowed", "overrides", "field", "needed"),
    [
        ((), {"capacity_factor": 1.0}, "capacity_factor", "capacity_factor"),
        (("noise",), {"capacity_factor": 1.0}, "capacity_factor", "capacity_factor"),
        ((), {"noise": "none"}, "noise", "noise"),
        (("capacity_factor",), {"capacity_factor": 1.0, "noise": "jitter", "seed": 1}, "noise", "noise"),
        (("capacity_factor",), {"seed": 1}, "seed", "noise"),
    ],
)
def test_what_the_operator_does_not_allow_is_refused(allowed: Any, overrides: dict[str, Any], field: str, needed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        override(GatingConfig(request_overrides=allowed), GatingOverrides(**overrides))
    assert str(caught.value) == f"{field} cannot be set by requests to this layer; gating.request_overrides must contain '{needed}'"
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("knobs", "overrides", "field", "sentence"),
    [
        ({}, {"capacity_factor": 0.0}, "capacity_factor", "capacity_factor: Input should be greater than 0 (got 0.0)"),
        ({}, {"capacity_factor": -math.inf}, "capacity_factor", "capacity_factor: Input should be"),
        ({}, {"capacity_factor": math.nan}, "capacity_factor", "capacity_factor: Input should be"),
        ({}, {"noise": "loud"}, "noise", "noise: Input should be 'none', 'jitter', 'rsample'"),
        ({}, {"noise": "jitter"}, "seed", "gating.seed is required with gating.noise = 'jitter'"),
        ({}, {"noise": "jitter", "seed": 2**63}, "seed", "seed: Input should be less than 9223372036854775808"),
        ({"top_k": 3}, {"noise": "gumbel_second", "seed": 1}, "noise", "gating.noise = 'gumbel_second' is about the second of two choices"),
        (
            {"routing": "expert_choice", "capacity_factor": 1.0},
            {"capacity_factor": math.inf},
            "capacity_factor",
            "gating.routing = 'expert_choice' needs gating.capacity_factor",
        ),
    ],
)
def test_what_a_configuration_would_refuse_is_refused(knobs: dict[str, Any], overrides: dict[str, Any], field: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        override(GatingConfig(**knobs, request_overrides=BOTH), GatingOverrides(**overrides))
    assert str(caught.value).startswith(sentence)
    assert [violation.field for violation in caught.value.violations] == [field]
