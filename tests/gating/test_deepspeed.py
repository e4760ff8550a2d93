"""The gate against DeepSpeed's own, as recorded by golden/make_deepspeed.py.

Which of several equal rows DeepSpeed keeps is up to `torch.topk`: its top-1 gate without random token selection compares how many are
kept, and what the kept ones weigh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.config import GatingConfig
from moeserve.gating import Routing, route
from tests.support.closeness import assert_close, near

from .golden.deepspeed_cases import GOLDEN, Case, all_cases, logits_of, used_token_of


@dataclass
class Answer:
    loss: float
    capacity: int
    demand: Tensor
    kept: Tensor
    weights: Tensor


def recorded() -> Iterator[tuple[Case, Answer]]:
    with np.load(GOLDEN) as files:
        golden = dict(files)
    demand = kept = weight = 0
    for index, case in enumerate(all_cases()):
        size = case.num_tokens * case.num_experts
        packed = -(-size // 8)
        bits = np.unpackbits(golden["kept"][kept : kept + packed])[:size]
        is_kept = torch.from_numpy(bits.reshape(case.num_tokens, case.num_experts)).bool()
        weights = torch.zeros(is_kept.shape)
        count = int(is_kept.sum())
        weights[is_kept] = torch.from_numpy(golden["weights"][weight : weight + count])
        yield (
            case,
            Answer(
                loss=float(golden["losses"][index]),
                capacity=int(golden["capacities"][index]),
                demand=torch.from_numpy(golden["demands"][demand : demand + case.num_experts].astype(np.int64)),
                kept=is_kept,
                weights=weights,
            ),
        )
        demand, kept, weight = demand + case.num_experts, kept + packed, weight + count


def ours(case: Case) -> Routing:
    gating = GatingConfig(
        top_k=case.top_k,
        renormalize="none" if case.gate == "top1" else "post_drop",
        capacity_factor=case.capacity_factor,
        min_capacity=case.min_capacity,
        capacity_rule="deepspeed",
        drop_tokens=case.drop_tokens,
        drop_policy="choice_major" if case.gate == "top2" else case.drop_policy,
        aux_loss="deepspeed_topk" if case.gate == "topk" else "deepspeed",
    )
    used = used_token_of(case)
    return route(logits_of(case), gating, None if used is None else used.bool())


def dense_kept(routing: Routing) -> Tensor:
    return torch.zeros(routing.dense().shape, dtype=torch.bool).scatter(1, routing.topk_ids, routing.kept)


def test_the_grid_is_large() -> None:
    assert sum(1 for _ in all_cases()) >= 1500


@pytest.mark.parametrize("gate", ["top1", "top2", "topk"])
def test_every_case_is_routed_as_deepspeed_does(gate: str) -> None:
    compared = 0
    for case, want in recorded():
        if case.gate != gate:
            continue
        got, compared = ours(case), compared + 1
        kept = dense_kept(got)
        if case.drop_tokens:
            assert got.capacity == want.capacity, case
        else:
            assert got.capacity is None
            assert int(got.requested.max()) == want.capacity, case
        assert torch.equal(got.requested, want.demand), case
        if gate == "top1":
            assert torch.equal(got.processed, want.kept.sum(dim=0)), case
            both = kept & want.kept
            assert_close(got.dense() * both, want.weights * both, summed=case.num_experts)
        else:
            assert torch.equal(kept, want.kept), case
            assert_close(got.dense(), want.weights, summed=case.num_experts)
        assert got.aux_loss == near(want.loss, summed=case.num_tokens + case.num_experts), case
    assert compared
