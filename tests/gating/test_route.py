"""The gate against the oracle, over every combination of knobs."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.config.gating import DropPolicy
from moeserve.errors import ConfigError
from moeserve.gating import BatchRouting, apply_choices, route, route_requests
from tests.support.closeness import assert_close, near

from . import oracle
from .cases import Case, cases

CapacityScope = Literal["request", "batch"]


def assert_agrees(got: BatchRouting, want: oracle.Answer, gating: GatingConfig) -> None:
    assert got.topk_ids.tolist() == want.topk_ids
    assert got.kept.tolist() == want.kept
    assert got.dropped_tokens.tolist() == want.dropped_tokens
    assert got.requested.tolist() == want.requested
    assert got.processed.tolist() == want.processed
    assert got.dropped.tolist() == want.dropped
    assert list(got.capacity) == want.capacity
    num_tokens, num_experts = len(got.topk_ids), got.requested.shape[1]
    assert_close(got.topk_weights, torch.tensor(want.topk_weights).view_as(got.topk_weights), summed=num_experts)
    assert_close(got.aux_loss, torch.tensor(want.aux_loss), summed=num_tokens + num_experts)
    # Logits are of size 1, also where their logsumexp is near 0.
    assert got.z_loss.tolist() == near(want.z_loss, summed=num_tokens + num_experts, size=gating.z_loss_weight)


def by_oracle(
    router_logits: Tensor, gating: GatingConfig, sizes: list[int], used: list[bool], luck: oracle.Matrix | None = None
) -> oracle.Answer:
    scores = router_logits.softmax(dim=1)
    return oracle.route(router_logits.tolist(), scores.tolist(), router_logits.shape[1], gating, sizes, used, luck or [])


@settings(max_examples=250, deadline=None)
@given(cases())
def test_a_batch_is_routed_as_the_oracle_does(case: Case) -> None:
    got = route_requests(case.router_logits, case.gating, case.sizes, case.used_token)
    assert_agrees(got, by_oracle(case.router_logits, case.gating, case.sizes, case.used, case.luck), case.gating)


@pytest.mark.parametrize("drop_policy", ["position", "choice_major", "probs"])
@pytest.mark.parametrize("capacity_scope", ["request", "batch"])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_a_large_batch_is_routed_as_the_oracle_does(drop_policy: DropPolicy, capacity_scope: CapacityScope, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    router_logits = torch.randint(0, levels, (300, 33), generator=generator) * (4.0 / levels)
    used_token = torch.rand(300, generator=generator) < 0.9
    gating = GatingConfig(top_k=5, renormalize="post_drop", capacity_factor=0.8, capacity_scope=capacity_scope, drop_policy=drop_policy)
    got = route_requests(router_logits, gating, [120, 0, 1, 179], used_token)
    assert got.dropped.sum() > 0
    assert_agrees(got, by_oracle(router_logits, gating, [120, 0, 1, 179], used_token.tolist()), gating)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([torch.int32, torch.int64]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_choices_of_the_caller_are_admitted_as_the_oracle_does(case: Case, id_dtype: torch.dtype, dtype: torch.dtype) -> None:
    # Logits of -2, 0, 2 give the caller negative, zero and tied weights, in no order. In steps of 1/64 their sums are exact, also those
    # that nearly cancel and so make the weights of survivors large.
    topk_ids = case.router_logits.argsort(dim=1)[:, : case.gating.top_k].flip(1).to(id_dtype)
    topk_weights = (case.router_logits[:, : case.gating.top_k] * 64).round().div(64).to(dtype)
    got = apply_choices(topk_ids, topk_weights, case.num_experts, case.gating, case.sizes, case.used_token)
    want = oracle.apply_choices(topk_ids.tolist(), topk_weights.tolist(), case.num_experts, case.gating, case.sizes, case.used, case.luck)
    assert_agrees(got, want, case.gating)
    assert got.topk_ids.dtype == torch.int64
    assert got.topk_weights.dtype == torch.float32


@settings(max_examples=100, deadline=None)
@given(cases())
def test_one_request_is_the_only_one_of_its_batch(case: Case) -> None:
    got = route(case.router_logits, case.gating, case.used_token)
    batch = route_requests(case.router_logits, case.gating, [len(case.router_logits)], case.used_token)
    assert torch.equal(got.topk_weights, batch.topk_weights)
    assert torch.equal(got.requested, batch.requested[0])
    assert (got.capacity, got.aux_loss, got.z_loss) == (batch.capacity[0], batch.aux_loss.item(), batch.z_loss.item())


def test_types_are_as_promised() -> None:
    got = route(torch.zeros(3, 4, dtype=torch.bfloat16), GatingConfig(top_k=2, capacity_factor=0.5))
    assert {t.dtype for t in (got.topk_ids, got.requested, got.processed, got.dropped)} == {torch.int64}
    assert got.topk_weights.dtype == got.dense().dtype == torch.float32
    assert got.kept.dtype == got.dropped_tokens.dtype == torch.bool
    assert [type(got.capacity), type(got.aux_loss), type(got.z_loss)] == [int, float, float]


def test_dense_spreads_the_weights_over_the_experts() -> None:
    router_logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    got = route(router_logits, GatingConfig(top_k=2, renormalize="post_drop", capacity_factor=0.5))
    assert got.capacity == 1
    scores = router_logits[0].softmax(dim=0)
    total = scores[1] + scores[2]
    assert_close(got.dense(), torch.tensor([[0, scores[1] / total, scores[2] / total], [0, 0, 0]]), summed=3)
    assert got.dropped_tokens.tolist() == [False, True]


@pytest.mark.parametrize("gating", [{"top_k": 2}, "top2", None])
def test_gating_is_a_config(gating: Any) -> None:
    with pytest.raises(ConfigError, match=r"gating is .*; allowed: a GatingConfig"):
        route(torch.zeros(3, 4), gating)
