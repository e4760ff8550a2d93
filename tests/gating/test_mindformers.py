"""The routing in rounds against its oracle, and by hand."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import GatingConfig
from moeserve.gating import route, route_requests
from tests.support.closeness import assert_close, near

from . import routings_oracle as oracle
from .inputs import COUNTS, SEEDS, as_list, logits_of, used_of


@settings(max_examples=150, deadline=None)
@given(SEEDS, COUNTS, st.integers(1, 6), st.sampled_from([None, 0.3, 0.7, 1.0, 1.5]), st.booleans())
def test_mindformers(seed: int, num_tokens: int, num_experts: int, factor: float | None, is_tied: bool) -> None:
    top_k, used = 1 + seed % num_experts, used_of(seed, num_tokens)
    logits = logits_of(seed, num_tokens, num_experts, is_tied)
    gating = GatingConfig(
        top_k=top_k,
        routing="mindformers",
        capacity_factor=factor,
        capacity_rule="mindformers",
        renormalize="post_drop",
        renormalize_eps=1e-9,
        aux_loss="mindformers",
        aux_loss_weight=0.05,
    )
    got = route(logits, gating, used)
    scores = logits.softmax(dim=1)
    ids, kept, loss = oracle.mindformers(scores.tolist(), top_k, got.capacity, as_list(used, num_tokens))
    assert got.topk_ids.view(-1, top_k).tolist() == ids
    assert got.kept.tolist() == kept
    weights = scores.gather(1, got.topk_ids) * got.kept
    assert_close(got.topk_weights, weights / (weights.sum(dim=1, keepdim=True) + 1e-9), summed=num_experts)
    assert got.aux_loss == near(0.05 * loss, summed=top_k * (num_tokens + num_experts))
    if got.capacity is not None:
        assert (got.processed <= got.capacity).all()


def test_mindformers_by_hand() -> None:
    """Three tokens want expert 0, which has room for two; the third asks again in vain, its second choice is never asked for."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().repeat(3, 1)
    gating = GatingConfig(
        routing="mindformers", capacity_factor=1.0, capacity_rule="mindformers", renormalize="post_drop", renormalize_eps=1e-9
    )
    got = route(logits, gating)
    assert got.capacity == 2
    assert got.topk_ids.tolist() == [[0, 1], [0, 1], [0, 0]]
    assert got.kept.tolist() == [[True, True], [True, True], [False, False]]
    assert got.slots.tolist() == [[0, 0], [1, 1], [-1, -1]]
    assert_close(got.dense(), torch.tensor([[2 / 3, 1 / 3, 0], [2 / 3, 1 / 3, 0], [0, 0, 0]]), summed=3)
    assert got.drops == [(2, 0, 0, "capacity"), (2, 1, 0, "capacity")]


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.lists(COUNTS, min_size=1, max_size=3), st.integers(1, 5))
def test_mindformers_settles_each_group_by_itself(seed: int, sizes: list[int], group_size: int) -> None:
    logits = logits_of(seed, sum(sizes), 4)
    knobs: dict[str, Any] = {"routing": "mindformers", "capacity_factor": 0.7, "capacity_rule": "mindformers"}
    got = route_requests(logits, GatingConfig(capacity_scope="group", expert_group_size=group_size, **knobs), sizes, None)
    start = 0
    for size in sizes:
        for first in range(start, start + size, group_size):
            tokens = slice(first, min(first + group_size, start + size))
            alone = route(logits[tokens], GatingConfig(**knobs))
            assert torch.equal(got.topk_ids[tokens], alone.topk_ids)
            assert torch.equal(got.kept[tokens], alone.kept)
            assert torch.equal(got.slots[tokens], alone.slots)
        start += size
