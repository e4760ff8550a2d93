"""Each concept of the gate by itself: known values, ties, edges and errors."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.gating import Router, apply_choices, route, route_requests
from moeserve.gating.aux_loss import AUX_LOSSES
from moeserve.gating.capacity import CAPACITY_RULES, CAPACITY_SCOPES, ceil
from moeserve.gating.drop import DROP_POLICIES
from moeserve.gating.scoring import SCORING, softmax
from moeserve.gating.selection import select_top_k
from moeserve.gating.weights import RENORMALIZE
from tests.support.closeness import assert_close, near


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("scoring_func", SCORING),
        ("renormalize", RENORMALIZE),
        ("capacity_rule", CAPACITY_RULES),
        ("capacity_scope", CAPACITY_SCOPES),
        ("drop_policy", DROP_POLICIES),
        ("aux_loss", AUX_LOSSES),
    ],
)
def test_every_value_of_a_knob_has_its_entry(field: str, table: dict[str, object]) -> None:
    assert set(get_args(GatingConfig.model_fields[field].annotation)) == set(table)


def test_softmax_is_exp_over_sum() -> None:
    logits = torch.randn(20, 7) * 3
    for row, scores in zip(logits.tolist(), softmax(logits).tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        assert scores == near([math.exp(x) / total for x in row], summed=7)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8, 9, 16, 31, 64, 257])
def test_equal_logits_go_to_the_lowest_expert(num_experts: int) -> None:
    for top_k in {1, min(2, num_experts), num_experts}:
        got = route(torch.full((5, num_experts), 0.7), GatingConfig(top_k=top_k))
        assert got.topk_ids.tolist() == [list(range(top_k))] * 5


def test_ties_are_settled_wherever_they_are() -> None:
    scores = torch.randint(0, 4, (500, 13), generator=torch.Generator().manual_seed(0)).float()
    for top_k in range(1, 14):
        want = [sorted(range(13), key=lambda e: (-row[e], e))[:top_k] for row in scores.tolist()]
        assert select_top_k(scores, top_k).tolist() == want


def test_scores_that_vanish_in_float32_are_ties() -> None:
    assert route(torch.tensor([[-200.0, 0.0, -150.0]]), GatingConfig(top_k=2)).topk_ids.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "factor", "rows"),
    [
        (25, 2, 1, 1.2, 15),  # float32 arithmetic gives 16
        (100, 2, 1, 1.1, 55),  # float64 arithmetic gives 56
        (0, 4, 2, 1.0, 0),
        (1, 64, 2, 0.01, 1),
        (4096, 256, 8, 1.25, 160),
        (3, 2, 2, 1e-5, 1),
        (3, 1, 1, 1e300, 3 * 10**300),
    ],
)
def test_capacity_is_exact(num_tokens: int, num_experts: int, top_k: int, factor: float, rows: int) -> None:
    assert ceil(num_tokens, num_experts, top_k, factor) == rows


def test_capacity_beyond_the_tokens_is_reported_and_drops_nothing() -> None:
    got = route(torch.randn(3, 2), GatingConfig(top_k=2, capacity_factor=1e300, min_capacity=4))
    assert got.capacity == 3 * 10**300
    assert not got.dropped.any()
    assert route(torch.randn(3, 2), GatingConfig(top_k=2, capacity_factor=0.1, min_capacity=40)).capacity == 40


def test_each_policy_keeps_its_own() -> None:
    topk_ids = torch.tensor([[1, 0], [0, 1], [0, 1]])
    topk_weights = torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.9, 0.1]])
    kept = {}
    for policy in ("position", "choice_major", "probs"):
        gating = GatingConfig(capacity_factor=0.3, drop_policy=policy, seed=0)
        kept[policy] = apply_choices(topk_ids, topk_weights, 2, gating, [3], None).kept.tolist()
    assert kept == {
        "position": [[True, True], [False, False], [False, False]],
        "choice_major": [[True, False], [True, False], [False, False]],
        "probs": [[True, False], [False, False], [True, False]],
    }


def test_survivors_take_over_the_share_of_the_dropped() -> None:
    gating = GatingConfig(capacity_factor=0.5, renormalize="post_drop", routed_scaling_factor=7.0)
    got = apply_choices(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[2.0, 1.0], [1.0, 0.5]]), 3, gating, [2], None)
    assert got.capacity == (1,)
    assert got.topk_weights.tolist() == [[2.0, 1.0], [0.0, 1.5]]
    assert got.aux_loss.tolist() == got.z_loss.tolist() == [0.0]


def test_losses_of_a_uniform_gate() -> None:
    got = route(torch.zeros(6, 4), GatingConfig(top_k=4))
    assert got.aux_loss == near(1.0, summed=6 + 4)
    assert got.z_loss == near(math.log(4) ** 2, summed=6 + 4)


def test_losses_of_a_collapsed_gate() -> None:
    router_logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(5, 1)
    got = route(router_logits, GatingConfig(top_k=1, aux_loss_weight=0.5, z_loss_weight=0.01))
    assert got.aux_loss == near(0.5 * 4, summed=5 + 4)
    assert got.z_loss == near(0.01 * 100**2, summed=5 + 4)


@pytest.mark.parametrize("gating", [GatingConfig(), GatingConfig(capacity_factor=1.0), GatingConfig(capacity_factor=1.0, min_capacity=4)])
@pytest.mark.parametrize("capacity_scope", ["request", "batch"])
def test_nothing_to_route(gating: GatingConfig, capacity_scope: str) -> None:
    gating = gating.model_copy(update={"capacity_scope": capacity_scope})
    got = route(torch.empty(0, 3), gating)
    assert list(got.topk_ids.shape) == [0, 2]
    assert list(got.dense().shape) == [0, 3]
    assert got.requested.tolist() == got.dropped.tolist() == [0, 0, 0]
    assert got.aux_loss == got.z_loss == 0.0
    unused = route(torch.zeros(2, 3), gating, torch.zeros(2, dtype=torch.bool))
    assert unused.requested.tolist() == [0, 0, 0]
    assert unused.aux_loss == unused.z_loss == 0.0
    assert not unused.dense().any()


def test_more_choices_than_experts() -> None:
    with pytest.raises(ConfigError, match=r"^top_k is 4 but the layer has 2 experts$"):
        route(torch.zeros(1, 2), GatingConfig(top_k=4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_the_first_token(value: float) -> None:
    router_logits = torch.zeros(6, 4)
    router_logits[3, 2] = router_logits[5, 0] = value
    with pytest.raises(InvalidRequest, match=r"^router_logits of token 3 is not finite"):
        route(router_logits, GatingConfig())
    with pytest.raises(InvalidRequest, match=r"^router_logits of token 1 of request 2 is not finite"):
        route_requests(router_logits, GatingConfig(), [2, 0, 4], None)


def test_finite_logits_too_large_to_add_up_are_routed() -> None:
    assert route(torch.full((2, 3), 3e38), GatingConfig(top_k=1)).topk_ids.tolist() == [[0], [0]]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InvalidRequest, match=r"router_logits must be \[tokens, experts\], got \[3\]"):
        route(torch.zeros(3), GatingConfig())
    for used_token in (torch.ones(2), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(InvalidRequest, match=r"used_token must be bool of shape \[2\]"):
            route(torch.zeros(2, 4), GatingConfig(), used_token)


def test_logits_are_real_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"router_logits is torch\.complex64; allowed: real numbers"):
        route(torch.zeros(2, 4, dtype=torch.complex64), GatingConfig())


def test_the_router_works_in_float32_whatever_comes_in() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_states, gate = (torch.randn(size, 16, generator=generator).bfloat16() for size in (6, 4))
    got = Router(gate, GatingConfig())(hidden_states, [6], None)
    router_logits = (hidden_states.double() @ gate.double().t()).float()
    assert_close(got.request(0).dense(), route(router_logits, GatingConfig()).dense(), summed=16)
