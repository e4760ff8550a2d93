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
from moeserve.layer.dispatch import Dispatch, HostLoads, HostWork, SharedWork, combine, permute, plan, plan_again
from moeserve.placement import LayerPlacement, plan_placement

HIDDEN_SIZE = 3
SHARED_FACTOR = 64.0


@dataclass
class Case:
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    kept: Tensor
    placement: LayerPlacement
    hosts: HostLoads
    shared: SharedWork | None

    @property
    def dispatch(self) -> Dispatch:
        return plan(self.topk_ids, self.topk_weights, self.kept, self.placement, self.hosts, self.shared)

    @property
    def works(self) -> list[HostWork]:
        return self.dispatch.works

    @property
    def used(self) -> Tensor:
        """[T] bool: what the shared expert is asked for."""
        if self.shared is None:
            return torch.zeros(len(self.hidden_states), dtype=torch.bool)
        return torch.ones(len(self.hidden_states), dtype=torch.bool) if self.shared.used_token is None else self.shared.used_token


@st.composite
def placements(draw: st.DrawFn, num_experts: int) -> LayerPlacement:
    """A planned one with copies and shards, or any assignment of experts to hosts, with hosts that hold nothing."""
    strategy = draw(st.sampled_from(["contiguous", "round_robin", "any"]))
    if strategy == "any":
        num_hosts = draw(st.integers(1, 12))
        host_of_logical = np.array(draw(st.lists(st.integers(0, num_hosts - 1), min_size=num_experts, max_size=num_experts)))
        logical_of_physical = host_of_logical.argsort(kind="stable")
        return LayerPlacement(num_hosts, logical_of_physical, host_of_logical[logical_of_physical])
    spec = LayerSpec("layer", 1, 1, num_experts, "relu", False, "float32", GatingConfig())
    num_hosts = draw(st.integers(1, num_experts))
    some = draw(st.dictionaries(st.integers(0, num_experts - 1).map(str), st.integers(1, num_hosts), max_size=2))
    config = PlacementConfig(
        num_hosts=num_hosts,
        strategy=strategy,
        copies={"layer": {"default": draw(st.integers(1, num_hosts)), **some}},
        tensor_parallel=draw(st.sampled_from([parts for parts in (1, 2, 4) if parts <= num_hosts])),
    )
    return draw(st.sampled_from(plan_placement([spec] * 3, config).layers))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 9))
    num_tokens, top_k = draw(st.sampled_from([0, 1, 2, 3, 5, 9, 200])), draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    placement = draw(placements(num_experts))
    any_hosts = st.lists(st.booleans(), min_size=placement.num_hosts, max_size=placement.num_hosts)
    loads = st.lists(st.integers(0, 300), min_size=placement.num_hosts, max_size=placement.num_hosts)
    used_token = torch.rand(num_tokens, generator=generator) < 0.7
    kept = torch.rand(num_tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Case(
        hidden_states=torch.randint(-8, 9, (num_tokens, HIDDEN_SIZE), generator=generator).float(),
        topk_ids=torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k],
        topk_weights=torch.randint(1, 9, (num_tokens, top_k), generator=generator) / 8,
        kept=kept & used_token[:, None],
        placement=placement,
        hosts=HostLoads(np.array(draw(any_hosts)), np.array(draw(loads)), draw(st.sampled_from(["least_outstanding", "round_robin"]))),
        shared=draw(st.sampled_from([None, SharedWork(torch.randint(1, 9, (num_tokens,), generator=generator) / 8, used_token)])),
    )


def factor(expert: Tensor) -> Tensor:
    """Expert e multiplies a row by e + 1, so that a pair that goes to the wrong expert shows; the shared one by 64."""
    return (expert + 1).float()


def factors(placement: LayerPlacement, host: int) -> Tensor:
    """What each slot of a host multiplies by: shards their part of the whole."""
    own = [(shard.expert + 1) / shard.of for shard in placement.shards_on(host)]
    return torch.tensor([*own, SHARED_FACTOR])


def answer(work: HostWork, rows: Tensor, placement: LayerPlacement) -> Tensor:
    """What a host makes of rows [R, H]: its experts, weighed and summed."""
    partial = torch.zeros(rows.shape)
    scale = factors(placement, work.host)[work.local_experts] * work.weights
    return partial.index_add_(0, work.row_index, rows[work.row_index] * scale[:, None])


def dense(case: Case) -> Tensor:
    """sum_k w_k * f_k(x), token by token, and the shared expert's for every used token."""
    total = torch.zeros_like(case.hidden_states)
    for t, k in case.kept.nonzero().tolist():
        total[t] += case.topk_weights[t, k] * factor(case.topk_ids[t, k]) * case.hidden_states[t]
    if case.shared is not None:
        total += (case.shared.weights * case.used)[:, None] * SHARED_FACTOR * case.hidden_states
    return total


def answered(case: Case, works: list[HostWork]) -> list[tuple[Tensor, Tensor]]:
    return [(work.rows, answer(work, permute(case.hidden_states, work.rows), case.placement)) for work in works]


def alone(case: Case) -> list[tuple[Tensor, Tensor]]:
    """What the head does itself, for tokens that go to no host."""
    rows = case.dispatch.alone
    return [(rows, case.shared.weights[rows, None] * SHARED_FACTOR * case.hidden_states[rows])] if case.shared is not None else []


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_dispatch_and_combine_are_the_dense_sum(case: Case) -> None:
    answers = answered(case, case.works) + alone(case)
    assert torch.equal(combine(answers, len(case.hidden_states), HIDDEN_SIZE), dense(case))


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=200)
def test_what_a_lost_host_had_is_done_by_others_where_there_are_copies(case: Case, data: st.DataObject) -> None:
    works = case.works
    lost = [work for work in works if data.draw(st.booleans())]
    live = np.array([not any(work.host == host for work in lost) for host in range(case.placement.num_hosts)])
    again = plan_again(lost, len(case.hidden_states), case.placement, HostLoads(live, case.hosts.load)) if lost else []
    kept = [work for work in works if all(work is not other for other in lost)]
    answers = answered(case, kept) + answered(case, again) + alone(case)
    assert torch.equal(combine(answers, len(case.hidden_states), HIDDEN_SIZE), dense(case))
    for work in again:
        needed = {
            case.placement.shards_on(work.host)[slot]
            for slot in work.local_experts.tolist()
            if slot < case.placement.shared_local_expert[work.host]
        }
        elsewhere = [host for host in np.flatnonzero(live).tolist() if needed & set(case.placement.shards_on(host))]
        assert live[work.host] or not elsewhere, "a host that is down is asked for what lives nowhere else"


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_a_host_that_is_down_is_asked_only_for_what_lives_nowhere_else(case: Case) -> None:
    live = case.hosts.is_live
    for work in case.works:
        held = case.placement.shards_on(work.host)
        needed = {held[slot] for slot in work.local_experts.tolist() if slot < len(held)}
        elsewhere = [host for host in np.flatnonzero(live).tolist() if needed & set(case.placement.shards_on(host))]
        assert live[work.host] or not elsewhere


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_the_shared_expert_costs_no_message_and_no_row(case: Case) -> None:
    without = plan(case.topk_ids, case.topk_weights, case.kept, case.placement, case.hosts).works
    assert [(work.host, work.rows.tolist()) for work in case.works] == [(work.host, work.rows.tolist()) for work in without]


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_every_kept_pair_goes_to_every_shard_of_its_expert_once(case: Case) -> None:
    sent = []
    for work in case.works:
        held = case.placement.shards_on(work.host)
        pairs = zip(work.row_index.tolist(), work.local_experts.tolist(), work.weights.tolist(), strict=True)
        sent += [(int(work.rows[row]), held[slot].expert, held[slot].shard, weight) for row, slot, weight in pairs if slot < len(held)]
    shards = range(case.placement.tensor_parallel)
    kept = [
        (t, int(case.topk_ids[t, k]), shard, float(case.topk_weights[t, k])) for t, k in case.kept.nonzero().tolist() for shard in shards
    ]
    assert sorted(sent) == sorted(kept)


@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_a_message_holds_each_row_once_and_all_in_order(case: Case) -> None:
    works = case.works
    assert [work.host for work in works] == sorted({work.host for work in works})
    for work in works:
        assert len(work.row_index) == len(work.local_experts) == len(work.weights) > 0
        assert work.rows.diff().gt(0).all()
        assert sorted(work.row_index.unique().tolist()) == list(range(len(work.rows)))
        assert work.local_experts.diff().ge(0).all()
        assert work.row_index.diff()[work.local_experts.diff() == 0].gt(0).all(), "pairs of one expert keep the order of their tokens"
        assert (work.rows.dtype, work.row_index.dtype) == (torch.int64, torch.int32)
        assert (work.local_experts.dtype, work.weights.dtype) == (torch.int32, torch.float32)


def test_no_tokens_make_no_messages() -> None:
    placement = LayerPlacement(2, np.arange(4), np.array([0, 0, 1, 1]))
    none = torch.zeros(0, 2)
    assert plan(none.long(), none, none.bool(), placement).works == []
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
