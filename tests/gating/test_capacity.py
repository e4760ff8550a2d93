"""The capacity rules: published numbers, and the same rule written once more."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import GatingConfig
from moeserve.config.gating import CapacityRule
from moeserve.gating import route, route_requests
from moeserve.gating.capacity import CAPACITY_RULES, expert_choice

from . import oracle

SIZES = st.integers(1, 5000)
EXPERTS = st.integers(1, 300)
FACTORS = st.one_of(st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.2, 1.25, 1.5, 2.0]), st.floats(0.01, 10))


@pytest.mark.parametrize(
    ("rule", "num_tokens", "num_experts", "top_k", "factor", "rows"),
    [
        ("ceil", 25, 2, 1, 1.2, 15),
        ("deepspeed", 25, 2, 1, 1.2, 16),
        ("deepspeed", 100, 2, 1, 1.1, 55),
        ("deepspeed", 64, 8, 2, 1.0, 16),
        ("colossalai_legacy", 50, 4, 2, 1.25, 16),  # floor(15.6) = 15, made even
        ("colossalai", 50, 4, 2, 1.25, 32),  # floor(31.25) = 31, made even
        ("colossalai", 40, 4, 2, 1.0, 20),
        ("mindformers", 10, 4, 1, 1.1, 3),
        ("mindformers", 128, 8, 2, 1.1, 36),
        ("mindformers_v2", 4, 2, 2, 1.5, 4),  # 6, but no more than tokens
        ("trustformers", 16, 8, 2, 1.25, 5),
    ],
)
def test_known_capacities(rule: str, num_tokens: int, num_experts: int, top_k: int, factor: float, rows: int) -> None:
    assert CAPACITY_RULES[rule](num_tokens, num_experts, top_k, factor) == rows


@pytest.mark.parametrize("rule", get_args(CapacityRule))
@settings(max_examples=200, deadline=None)
@given(num_tokens=SIZES, num_experts=EXPERTS, top_k=st.integers(1, 8), factor=FACTORS)
def test_rules_agree_with_the_oracle(rule: str, num_tokens: int, num_experts: int, top_k: int, factor: float) -> None:
    assert CAPACITY_RULES[rule](num_tokens, num_experts, top_k, factor) == oracle.rounded(rule, num_tokens, num_experts, top_k, factor)


@pytest.mark.parametrize("rule", get_args(CapacityRule))
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_extreme_factors_are_no_trouble(rule: Any, num_tokens: int, factor: float) -> None:
    got = route(torch.zeros(num_tokens, 2), GatingConfig(capacity_factor=factor, capacity_rule=rule))
    assert got.capacity is not None
    assert torch.equal(got.processed, got.requested.clamp(max=min(got.capacity, num_tokens)))


def test_room_for_everybody_beside_room_for_few() -> None:
    gating = GatingConfig(top_k=1, capacity_factor=1e300)
    for routing in ("learned", "mindformers"):
        got = route_requests(torch.zeros(5, 2), gating.model_copy(update={"routing": routing}), [2, 3], None)
        assert got.kept.all()


def test_a_bound_and_a_multiple_come_after_the_rule() -> None:
    gating = GatingConfig(top_k=1, capacity_factor=1.0, min_capacity=4, capacity_multiple=8)
    assert route(torch.zeros(6, 3), gating).capacity == 8
    v2 = GatingConfig(top_k=2, capacity_factor=2.0, capacity_rule="mindformers_v2", capacity_multiple=4)
    assert route(torch.zeros(6, 3), v2).capacity == 8  # min(8, 6) = 6, made a multiple of 4


def test_groups_are_cut_from_each_request() -> None:
    gating = GatingConfig(top_k=1, capacity_factor=1.0, capacity_scope="group", expert_group_size=4)
    got = route_requests(torch.zeros(9, 2), gating, [6, 0, 3], None)
    assert got.capacity == (2, 0, 2)
    # 4 + 2 tokens, then 3: rows 0 and 1 of each group of four, one of two, two of three
    assert got.kept.flatten().tolist() == [True, True, False, False, True, False, True, True, False]
    assert got.slots.flatten().tolist() == [0, 1, -1, -1, 0, -1, 0, 1, -1]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "factor", "rows"), [(16, 4, 1.0, 4), (10, 4, 1.0, 2), (3, 8, 1.0, 1), (0, 8, 1.0, 0), (2, 1, 9.0, 2)]
)
def test_experts_take_their_share(num_tokens: int, num_experts: int, factor: float, rows: int) -> None:
    assert expert_choice(num_tokens, num_experts, 2, factor) == rows
