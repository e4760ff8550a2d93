"""Dispatch and combine against the dense sum over every expert, in numbers that float32 holds exactly.

T tokens, K choices per token, E experts, H hidden size, R rows sent to one host, N pairs of one host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.config import GatingConfig, LayerSpec, PlacementConfig
from moeserve.dispatch import HostWork, combine, permute, plan
from moeserve.placement import LayerPlacement, plan_placement

HIDDEN_SIZE = 3


@dataclass
class Case:
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    kept: Tensor
    placement: LayerPlacement

    @property
    def works(self) -> list[HostWork]:
        return plan(self.topk_ids, self.topk_weights, self.kept, self.placement)


@st.composite
def placements(draw: st.DrawFn, num_experts: int) -> LayerPlacement:
    """A planned one, or any assignment of experts to hosts, with hosts that hold nothing."""
    strategy = draw(st.sampled_from(["contiguous", "round_robin", "any"]))
    if strategy == "any":
        num_hosts = draw(st.integers(1, 12))
        host_of_logical = np.array(draw(st.lists(st.integers(0, num_hosts - 1), min_size=num_experts, max_size=num_experts)))
        logical_of_physical = host_of_logical.argsort(kind="stable")
        return LayerPlacement(num_hosts, logical_of_physical, host_of_logical[logical_of_physical])
    spec = LayerSpec("layer", 1, 1, num_experts, "relu", False, "float32", GatingConfig())
    config = PlacementConfig(num_hosts=draw(st.integers(1, num_experts)), strategy=strategy)
    return draw(st.sampled_from(plan_placement([spec] * 3, config).layers))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 9))
    num_tokens, top_k = draw(st.integers(0, 9)), draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return Case(
        hidden_states=torch.randint(-8, 9, (num_tokens, HIDDEN_SIZE), generator=generator).float(),
        topk_ids=torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k],
        topk_weights=torch.randint(1, 9, (num_tokens, top_k), generator=generator) / 8,
        kept=torch.rand(num_tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])),
        placement=draw(placements(num_experts)),
    )


def factor(expert: Tensor) -> Tensor:
    """Expert e multiplies a row by e + 1, so that a pair that goes to the wrong expert shows."""
    return (expert + 1).float()


def answer(work: HostWork, rows: Tensor, placement: LayerPlacement) -> Tensor:
    """What a host makes of rows [R, H]: its experts, weighed and summed."""
    held = torch.tensor(placement.experts_on(work.host))
    partial = torch.zeros(rows.shape)
    return partial.index_add_(0, work.row_index, rows[work.row_index] * (factor(held[work.slots]) * work.weights)[:, None])


def dense(case: Case) -> Tensor:
    """sum_k w_k * f_k(x), token by token."""
    total = torch.zeros_like(case.hidden_states)
    for t, k in case.kept.nonzero().tolist():
        total[t] += case.topk_weights[t, k] * factor(case.topk_ids[t, k]) * case.hidden_states[t]
    return total


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_dispatch_and_combine_are_the_dense_sum(case: Case) -> None:
    answers = [(work.rows, answer(work, permute(case.hidden_states, work.rows), case.placement)) for work in case.works]
    assert torch.equal(combine(answers, len(case.hidden_states), HIDDEN_SIZE), dense(case))


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_every_kept_pair_goes_to_the_host_of_its_expert_and_nowhere_else(case: Case) -> None:
    sent = [
        (int(work.rows[row]), case.placement.experts_on(work.host)[slot], weight)
        for work in case.works
        for row, slot, weight in zip(work.row_index.tolist(), work.slots.tolist(), work.weights.tolist(), strict=True)
    ]
    kept = [(t, int(case.topk_ids[t, k]), float(case.topk_weights[t, k])) for t, k in case.kept.nonzero().tolist()]
    assert sorted(sent) == sorted(kept)


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_a_message_holds_each_row_once_and_all_in_order(case: Case) -> None:
    works = case.works
    assert [work.host for work in works] == sorted({work.host for work in works})
    for work in works:
        assert len(work.row_index) == len(work.slots) == len(work.weights) > 0
        assert work.rows.diff().gt(0).all()
        assert sorted(work.row_index.unique().tolist()) == list(range(len(work.rows)))
        assert work.slots.diff().ge(0).all()
        assert work.row_index.diff()[work.slots.diff() == 0].gt(0).all(), "pairs of one expert keep the order of their tokens"
        assert (work.rows.dtype, work.row_index.dtype) == (torch.int64, torch.int64)
        assert (work.slots.dtype, work.weights.dtype) == (torch.int32, torch.float32)


def test_no_tokens_make_no_messages() -> None:
    placement = LayerPlacement(2, np.arange(4), np.array([0, 0, 1, 1]))
    none = torch.zeros(0, 2)
    assert plan(none.long(), none, none.bool(), placement) == []
    assert combine([], 0, HIDDEN_SIZE).shape == (0, HIDDEN_SIZE)
    assert torch.equal(combine([], 2, HIDDEN_SIZE), torch.zeros(2, HIDDEN_SIZE))


def test_permute_copies_only_what_it_must() -> None:
    hidden_states = torch.randn(4, HIDDEN_SIZE).bfloat16()
    rows = torch.tensor([1, 3])
    assert torch.equal(permute(hidden_states, rows), hidden_states[rows])
    assert permute(hidden_states, torch.arange(4)) is hidden_states
    out = torch.empty(4, HIDDEN_SIZE, dtype=torch.bfloat16)
    assert permute(hidden_states, torch.arange(4), out=out) is out
    assert torch.equal(out, hidden_states)


def test_the_sum_is_the_callers_own() -> None:
    partial = torch.ones(3, HIDDEN_SIZE)
    total = combine([(torch.arange(3), partial)], 3, HIDDEN_SIZE)
    partial.zero_()
    assert total.eq(1).all()


def test_sums_run_in_the_order_given() -> None:
    tiny, large = torch.full((1, 1), 2.0**-24), torch.ones(1, 1)
    row = torch.tensor([0])
    in_order = combine([(row, tiny), (row, tiny), (row, large)], 1, 1)
    assert in_order.item() == 1 + 2.0**-23
    assert combine([(row, large), (row, tiny), (row, tiny)], 1, 1).item() == 1
