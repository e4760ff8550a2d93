"""Each routing against its oracle, and what only it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import GatingConfig
from moeserve.errors import ConfigError, InvalidRequest
from moeserve.gating import Router, route, route_requests
from moeserve.gating.routings.hashing import fnv1a
from tests.support.closeness import assert_close, near
from tests.support.odd_tensors import Elsewhere

from . import routings_oracle as oracle
from .inputs import COUNTS, SEEDS, as_list, logits_of, used_of


@settings(max_examples=100, deadline=None)
@given(
    SEEDS, COUNTS, st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 4)]), st.integers(2, 5), st.booleans(), st.sampled_from(["max", "top2_sum"])
)
def test_groups(seed: int, num_tokens: int, groups: tuple[int, int], size: int, is_tied: bool, group_score: Any) -> None:
    num_groups, topk_groups = groups
    top_k = 1 + seed % (topk_groups * size)
    logits = logits_of(seed, num_tokens, num_groups * size, is_tied)
    gating = GatingConfig(
        top_k=top_k, scoring_func="sigmoid", num_expert_groups=num_groups, topk_groups=topk_groups, group_score=group_score
    )
    bias = torch.linspace(-0.5, 0.5, num_groups * size) if seed % 3 else None
    got = route(logits, gating, score_correction_bias=bias)
    scores = logits.sigmoid()
    ranked = scores if bias is None else scores + bias
    want = oracle.grouped(ranked.tolist(), top_k, num_groups, topk_groups, group_score)
    assert got.topk_ids.tolist() == want
    assert_close(got.topk_weights, scores.gather(1, got.topk_ids), summed=0)


def test_groups_that_do_not_fit_the_layer() -> None:
    refusals: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_expert_groups": 3, "topk_groups": 1}, "num_expert_groups is 3, which does not divide the layer's 8 experts"),
        ({"num_expert_groups": 4, "topk_groups": 1, "top_k": 3}, "top_k is 3, but gating.topk_groups = 1 leaves 2 experts"),
        ({"num_expert_groups": 8, "topk_groups": 2, "group_score": "top2_sum"}, "needs two experts in a group"),
    )
    for knobs, sentence in refusals:
        with pytest.raises(ConfigError, match=sentence):
            route(torch.zeros(2, 8), GatingConfig(**{"top_k": 2, **knobs}))


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    bias = torch.tensor([9.0, 0.0, 0.0])
    got = route(logits, GatingConfig(top_k=2, scoring_func="sigmoid"), score_correction_bias=bias)
    assert got.topk_ids.tolist() == [[0, 2]]
    assert_close(got.topk_weights, logits.sigmoid()[:, [0, 2]], summed=0)
    with pytest.raises(ConfigError, match=r"score_correction_bias must be \[3\]"):
        route(logits, GatingConfig(), score_correction_bias=bias[:2])


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.lists(COUNTS, min_size=1, max_size=3), st.integers(1, 6), st.sampled_from([0.1, 0.5, 1.0, 2.5]), st.booleans())
def test_expert_choice(seed: int, sizes: list[int], num_experts: int, factor: float, is_tied: bool) -> None:
    total = sum(sizes)
    logits, used = logits_of(seed, total, num_experts, is_tied), used_of(seed, total)
    gating = GatingConfig(top_k=1, routing="expert_choice", capacity_factor=factor)
    got = route_requests(logits, gating, sizes, used)
    scores, start = logits.softmax(dim=1), 0
    for index, size in enumerate(sizes):
        tokens = slice(start, start + size)
        limit = min(max(1, math.floor(factor * size / num_experts)), size)
        assert got.capacity[index] == limit
        mine = as_list(used, total)[tokens]
        takers = oracle.expert_choice(scores[tokens].tolist(), num_experts, limit, mine)
        assert [set(ids[kept].tolist()) for ids, kept in zip(got.topk_ids[tokens], got.kept[tokens], strict=True)] == takers
        assert got.processed[index].tolist() == [min(limit, sum(mine))] * num_experts
        assert got.dropped_tokens[tokens].tolist() == [is_used and not taker for is_used, taker in zip(mine, takers, strict=True)]
        start += size
    assert not got.dropped.any()
    assert_close(got.topk_weights, scores.gather(1, got.topk_ids) * got.kept, summed=num_experts)


def test_fnv1a_of_known_words() -> None:
    assert oracle.fnv1a(b"") == 0x811C9DC5
    assert oracle.fnv1a(b"a") == 0xE40C292C
    assert oracle.fnv1a(b"foobar") == 0xBF9CF968
    words = torch.tensor([0, 1, 255, 256, 2**31, 2**32 - 1])
    assert fnv1a(words).tolist() == [oracle.fnv1a(word.to_bytes(4, "little")) for word in words.tolist()]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(1, 9), SEEDS)
def test_hash(token_ids: list[int], num_experts: int, seed: int) -> None:
    top_k = 1 + seed % num_experts
    gating = GatingConfig(top_k=top_k, routing="hash")
    got = route(torch.zeros(len(token_ids), num_experts), gating, token_ids=torch.tensor(token_ids, dtype=torch.int64))
    assert got.topk_ids.tolist() == [oracle.hashed(token_id, num_experts, top_k) for token_id in token_ids]
    assert (got.topk_weights == 1).all()


def test_hash_needs_token_ids() -> None:
    gating = GatingConfig(routing="hash")
    with pytest.raises(InvalidRequest, match="token_ids is required"):
        route(torch.zeros(2, 4), gating)
    for token_ids in (torch.tensor([0, -1]), torch.tensor([0, 2**32])):
        with pytest.raises(InvalidRequest, match=r"token_ids must be in 0..4294967295"):
            route(torch.zeros(2, 4), gating, token_ids=token_ids)
    for token_ids in (torch.zeros(2), torch.zeros(2, dtype=torch.complex64), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(InvalidRequest, match=r"token_ids must be int of shape \[2\]|token_ids is torch\.complex64; allowed"):
            route(torch.zeros(2, 4), gating, token_ids=token_ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32])
def test_token_ids_may_be_unsigned(dtype: torch.dtype) -> None:
    gating, used_token = GatingConfig(routing="hash"), torch.tensor([True, False, True])
    got, want = (route(torch.zeros(3, 4), gating, used_token, torch.tensor([7, 8, 255], dtype=each)) for each in (dtype, torch.int64))
    assert torch.equal(got.topk_ids, want.topk_ids)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.lists(COUNTS, min_size=1, max_size=3), st.integers(1, 6), st.sampled_from(["request", "batch"]))
def test_least_loaded(seed: int, sizes: list[int], num_experts: int, scope: Any) -> None:
    top_k, total = 1 + seed % num_experts, sum(sizes)
    used = used_of(seed, total)
    gating = GatingConfig(top_k=top_k, routing="least_loaded", capacity_scope=scope)
    got = route_requests(torch.zeros(total, num_experts), gating, sizes, used)
    groups, start = sizes if scope == "request" else [total], 0
    for size in groups:
        tokens = slice(start, start + size)
        want = oracle.least_loaded(as_list(used, total)[tokens], num_experts, top_k)
        for ids, experts in zip(got.topk_ids[tokens].tolist(), want, strict=True):
            assert experts is None or set(ids) == experts
        start += size
    assert got.topk_weights[got.kept].tolist() == near([1 / top_k] * int(got.kept.sum()), summed=0)


@settings(max_examples=100, deadline=None)
@given(SEEDS, COUNTS, st.integers(1, 6), st.sampled_from([0.0, 0.01, 0.2, 1.0]), st.booleans())
def test_sparsemixer(seed: int, num_tokens: int, num_experts: int, eps: float, is_tied: bool) -> None:
    # In steps of 1/64 no logit is so nearly at the edge of what is near that rounding decides.
    top_k, logits = 1 + seed % num_experts, (logits_of(seed, num_tokens, num_experts, is_tied) * 64).round() / 64
    got = route(logits, GatingConfig(top_k=top_k, routing="sparsemixer", sparsemixer_eps=eps))
    ids, weights = oracle.sparsemixer(logits.tolist(), top_k, eps)
    assert got.topk_ids.view(-1, top_k).tolist() == ids
    assert_close(got.topk_weights, torch.tensor(weights).view(-1, top_k), summed=num_experts)


@settings(max_examples=50, deadline=None)
@given(SEEDS, COUNTS, st.integers(1, 6))
def test_similarity(seed: int, num_tokens: int, num_experts: int) -> None:
    top_k = 1 + seed % num_experts
    hidden_states, centroids = logits_of(seed, num_tokens, 5), logits_of(seed + 1, num_experts, 5)
    gating = GatingConfig(top_k=top_k, routing="similarity")
    got = route(torch.zeros(num_tokens, num_experts), gating, hidden_states=hidden_states, centroids=centroids)
    ids, weights = oracle.similarity(hidden_states.tolist(), centroids.tolist(), top_k)
    assert got.topk_ids.view(-1, top_k).tolist() == ids
    assert_close(got.topk_weights, torch.tensor(weights).view(-1, top_k), summed=2 * 5 + num_experts)


def test_logits_that_are_not_there_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="router_logits is a strided Elsewhere on cpu; allowed: dense tensors that have data"):
        route(Elsewhere(2, 4), GatingConfig())


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_a_cosine_does_not_depend_on_lengths(scale: float) -> None:
    rows, centroids = (torch.randn(count, 5, generator=torch.Generator().manual_seed(count)) for count in (20, 6))
    gating = GatingConfig(top_k=3, routing="similarity")
    expected = route(torch.zeros(20, 6), gating, hidden_states=rows, centroids=centroids)
    got = route(torch.zeros(20, 6), gating, hidden_states=rows * scale, centroids=centroids * scale)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    assert_close(got.topk_weights, expected.topk_weights, summed=5)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), r"hidden_states of token 1 is not finite"),
        (torch.ones(2, 3), "hidden_states are 3 wide; the centroids have 2 numbers"),
    ],
)
def test_rows_that_have_no_cosine(rows: torch.Tensor, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        route(torch.zeros(2, 4), GatingConfig(routing="similarity"), hidden_states=rows, centroids=torch.ones(4, 2))


def test_what_a_layer_owns_can_be_compared() -> None:
    bias = torch.tensor([0.0, torch.nan, 0.0, 0.0])
    with pytest.raises(ConfigError, match="score_correction_bias has NaN"):
        route(torch.zeros(2, 4), GatingConfig(), score_correction_bias=bias)
    with pytest.raises(ConfigError, match="centroids have NaN or Inf"):
        Router(torch.zeros(4, 2), GatingConfig(routing="similarity"), centroids=torch.full((4, 2), torch.inf))
    excluded = route(torch.zeros(2, 4), GatingConfig(), score_correction_bias=torch.tensor([-torch.inf, 0.0, 0.0, 0.0]))
    assert excluded.topk_ids.tolist() == [[1, 2]] * 2


def test_similarity_takes_the_rows_of_the_gate_as_centroids() -> None:
    hidden_states, gate = logits_of(0, 6, 5), logits_of(1, 4, 5)
    gating = GatingConfig(routing="similarity")
    got = Router(gate, gating)(hidden_states, [6], None)
    want = route(torch.zeros(6, 4), gating, hidden_states=hidden_states, centroids=gate)
    assert torch.equal(got.topk_ids, want.topk_ids)
    with pytest.raises(InvalidRequest, match="hidden_states is required"):
        route(torch.zeros(6, 4), gating, centroids=gate)
    with pytest.raises(ConfigError, match="needs centroids"):
        route(torch.zeros(6, 4), gating, hidden_states=hidden_states)


def test_a_token_of_zeros_is_like_nothing() -> None:
    got = route(torch.zeros(1, 3), GatingConfig(routing="similarity"), hidden_states=torch.zeros(1, 4), centroids=torch.ones(3, 4))
    assert got.topk_ids.tolist() == [[0, 1]]
    assert got.topk_weights.tolist() == [[0.5, 0.5]]


def test_random_experts_are_distinct_and_the_same_every_time() -> None:
    gating = GatingConfig(top_k=3, routing="random", seed=5)
    got = route_requests(torch.zeros(600, 8), gating, [200, 400], None)
    again = route(torch.zeros(200, 8), gating)
    assert torch.equal(got.topk_ids[:200], again.topk_ids)
    assert torch.equal(got.topk_ids[:200], got.topk_ids[200:400])  # the same request in other company
    assert (got.topk_ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert got.requested.sum(dim=0).min() > 600 * 3 / 8 * 0.8
    assert (got.topk_weights == torch.tensor(1 / 3)).all()
    other = route(torch.zeros(200, 8), gating.model_copy(update={"seed": 6}))
    assert not torch.equal(other.topk_ids, again.topk_ids)


@pytest.mark.parametrize(
    "routing", ["learned", "expert_choice", "hash", "random", "least_loaded", "similarity", "mindformers", "sparsemixer"]
)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 2), (1, 1, 1), (5, 1, 1), (3, 4, 4), (2, 3, 1)])
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_small_inputs(routing: str, num_tokens: int, num_experts: int, top_k: int, factor: float) -> None:
    gating = GatingConfig(top_k=top_k, routing=routing, seed=1, capacity_factor=factor, min_capacity=4, renormalize="post_drop")
    for used_token in (None, torch.zeros(num_tokens, dtype=torch.bool)):
        got = route(
            torch.zeros(num_tokens, num_experts),
            gating,
            used_token,
            token_ids=torch.arange(num_tokens),
            hidden_states=torch.ones(num_tokens, 2),
            centroids=torch.ones(num_experts, 2),
        )
        assert torch.equal(got.requested, got.processed + got.dropped)
        assert got.topk_ids.shape == (num_tokens, gating.choices_per_token(num_experts))
        assert list(got.dense().shape) == [num_tokens, num_experts]
        assert math.isfinite(got.aux_loss)
        assert got.slots.shape == got.topk_ids.shape
        if used_token is not None:
            assert not got.requested.any()
            assert not got.dense().any()
