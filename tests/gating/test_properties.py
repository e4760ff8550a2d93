"""What holds for every routing, whatever the knobs."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeserve.config import GatingConfig
from moeserve.gating import Routing, apply_choices, route, route_requests
from tests.support.closeness import assert_close, near

from . import oracle
from .cases import Case, cases

TENSORS = [field.name for field in dataclasses.fields(Routing) if field.type == "Tensor"]


def assert_same(left: Routing, right: Routing, gating: GatingConfig) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.capacity == right.capacity
    # Rows are added up in a batch as they are alone but for what lies between; T + E terms.
    summed = len(left.topk_ids) + len(left.requested)
    assert left.aux_loss == near(right.aux_loss, summed)
    # Logits are of size 1, also where their logsumexp is near 0.
    assert left.z_loss == near(right.z_loss, summed, size=gating.z_loss_weight)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_choice_is_counted_once(case: Case) -> None:
    got = route_requests(case.router_logits, case.gating, case.sizes, case.used_token)
    used = torch.tensor(case.used, dtype=torch.bool)
    assert torch.equal(got.processed + got.dropped, got.requested)
    assert (got.dropped >= 0).all()
    assert list(got.used_tokens) == [int(part.sum()) for part in torch.split(used, case.sizes)]
    assert torch.equal(got.requested.sum(dim=1), torch.tensor(got.used_tokens) * case.gating.top_k)
    assert got.processed.sum() == got.kept.sum()
    assert not got.kept[~used].any()
    assert not got.topk_weights[~got.kept].any()
    assert torch.equal(got.dropped_tokens, used & ~got.kept.all(dim=1))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_capacity_is_never_exceeded_and_never_wasted(case: Case) -> None:
    got = route_requests(case.router_logits, case.gating, case.sizes, case.used_token)
    if got.capacity[0] is None:
        assert not got.dropped.any()
        return
    limits = iter([got.capacity[0]] if case.gating.capacity_scope == "batch" else got.capacity)
    for tokens in oracle.groups_of(case.gating, case.sizes):
        demand, taken = (torch.bincount(got.topk_ids[tokens][mask[tokens]], minlength=case.num_experts) for mask in (got.chosen, got.kept))
        if case.gating.capacity_scope == "group":
            limit = route(case.router_logits[tokens], case.gating).capacity
        else:
            limit = next(limits)
        assert limit is not None
        assert torch.equal(taken, demand.clamp(max=limit))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_slots_fill_every_expert_from_row_0_in_order(case: Case) -> None:
    got = route_requests(case.router_logits, case.gating, case.sizes, case.used_token)
    rows = got.slots.tolist()
    for tokens in oracle.groups_of(case.gating, case.sizes):
        choices = [(t, k) for t in tokens for k in range(case.gating.top_k)]
        if case.gating.drop_policy == "choice_major":
            choices.sort(key=lambda choice: (choice[1], choice[0]))
        filled = [0] * case.num_experts
        for t, k in choices:
            expert = int(got.topk_ids[t, k])
            assert rows[t][k] == (filled[expert] if got.kept[t, k] else -1)
            filled[expert] += bool(got.kept[t, k])


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_drop_is_named(case: Case) -> None:
    got = route(case.router_logits, case.gating, case.used_token)
    assert len(got.drops) == got.dropped.sum()
    for token, choice, expert, reason in got.drops:
        assert (expert, reason) == (int(got.topk_ids[token, choice]), "capacity")
        assert got.dropped_tokens[token]
        assert not got.kept[token, choice]


@settings(max_examples=100, deadline=None)
@given(cases(scopes=("request", "group")))
def test_a_request_is_answered_the_same_in_any_company(case: Case) -> None:
    batch = route_requests(case.router_logits, case.gating, case.sizes, case.used_token)
    used_parts = [None] * len(case.sizes) if case.used_token is None else torch.split(case.used_token, case.sizes)
    for index, (logits, used_token) in enumerate(zip(torch.split(case.router_logits, case.sizes), used_parts, strict=True)):
        assert_same(batch.request(index), route(logits, case.gating, used_token), case.gating)


@settings(max_examples=100, deadline=None)
@given(cases(scopes=("request", "group")))
def test_choices_are_admitted_the_same_in_any_company(case: Case) -> None:
    top_k, num_experts = case.gating.top_k, case.num_experts
    topk_ids = case.router_logits.argsort(dim=1)[:, :top_k]
    topk_weights = case.router_logits[:, :top_k].abs()
    batch = apply_choices(topk_ids, topk_weights, num_experts, case.gating, case.sizes, case.used_token)
    start = 0
    for index, size in enumerate(case.sizes):
        tokens = slice(start, start + size)
        used_token = None if case.used_token is None else case.used_token[tokens]
        alone = apply_choices(topk_ids[tokens], topk_weights[tokens], num_experts, case.gating, [size], used_token)
        assert_same(batch.request(index), alone.request(0), case.gating)
        start += size


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38]))
def test_unused_rows_may_hold_anything(case: Case, value: float) -> None:
    if case.used_token is None:
        return
    dirty = case.router_logits.masked_fill(~case.used_token[:, None], value)
    got, want = (route(logits, case.gating, case.used_token) for logits in (dirty, case.router_logits))
    for name in set(TENSORS) - {"topk_ids"}:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.topk_ids[case.used_token], want.topk_ids[case.used_token])
    assert torch.equal(got.dense(), want.dense())
    assert (got.aux_loss, got.z_loss) == (want.aux_loss, want.z_loss)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_renaming_the_experts_renames_the_answer(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    router_logits = torch.randn(case.router_logits.shape, generator=generator)
    # Ties go by the name, and softmax adds up in another order: no two scores are nearly equal.
    assume(case.num_experts == 1 or (router_logits.softmax(dim=1).flatten().sort().values.diff() > 1e-6).all())
    old_name = torch.randperm(case.num_experts, generator=generator)
    got = route_requests(router_logits, case.gating, case.sizes, case.used_token)
    renamed = route_requests(router_logits[:, old_name], case.gating, case.sizes, case.used_token)
    assert torch.equal(old_name[renamed.topk_ids], got.topk_ids)
    assert torch.equal(renamed.kept, got.kept)
    assert torch.equal(renamed.processed, got.processed[:, old_name])
    assert_close(renamed.topk_weights, got.topk_weights, summed=case.num_experts)
    assert_close(renamed.aux_loss, got.aux_loss, summed=case.num_experts + len(router_logits))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_the_same_input_gives_the_same_bits(case: Case) -> None:
    first, second = (route(case.router_logits, case.gating, case.used_token) for _ in range(2))
    assert_same(first, second, case.gating)
    assert (first.aux_loss, first.z_loss) == (second.aux_loss, second.z_loss)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_inputs_are_left_alone(case: Case) -> None:
    before = case.router_logits.clone()
    route_requests(case.router_logits, case.gating, case.sizes, case.used_token)
    assert torch.equal(case.router_logits, before)


def test_unused_tokens_take_no_room() -> None:
    router_logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    gating = GatingConfig(top_k=1, capacity_factor=1.0)
    got = route(router_logits, gating, torch.tensor([False, True, False, True]))
    assert got.capacity == 2  # of all four tokens
    assert got.kept.tolist() == [[False], [True], [False], [True]]
