"""What stands in rows that do not count is nobody's business: the same answer, bit for bit, whatever it is.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve import ForwardOutput, GatingConfig, InvalidRequest, MoELayer
from moeserve.gating import Router
from tests.support.kinds_of_experts import KINDS

HIDDEN, EXPERTS, TOKENS = 16, 6, 12
NAN, INF = float("nan"), float("inf")
GARBAGE = (NAN, INF, -INF, 3e38, -1e-40, 1.0)
GATINGS: tuple[dict[str, Any], ...] = (
    {},
    {"renormalize": "post_drop", "capacity_factor": 0.5, "drop_policy": "probs"},
    {"capacity_factor": 0.5, "drop_policy": "random", "seed": 1},
    {"capacity_factor": 0.7, "drop_policy": "choice_major", "capacity_scope": "group", "expert_group_size": 5},
    {"scoring_func": "sigmoid", "num_expert_groups": 3, "topk_groups": 2, "group_score": "top2_sum", "renormalize": "pre_drop"},
    {"scoring_func": "softmax_topk", "aux_loss": "deepspeed"},
    {"scoring_func": "sqrt_softplus", "aux_loss": "deepspeed_topk"},
    {"routing": "expert_choice", "capacity_factor": 1.0, "aux_loss": "colossalai"},
    {"routing": "hash"},
    {"routing": "random", "seed": 1},
    {"routing": "least_loaded"},
    {"routing": "similarity"},
    {"routing": "mindformers", "capacity_factor": 0.5, "renormalize": "post_drop", "renormalize_eps": 1e-9, "aux_loss": "mindformers"},
    {"routing": "sparsemixer"},
    {"routing": "tests.gating.test_plugin:LastExperts"},
    *({"noise": noise, "seed": 3} for noise in ("jitter", "normal", "uniform", "rsample", "gumbel_second")),
)


def assert_same(left: ForwardOutput, right: ForwardOutput) -> None:
    """To the bit."""
    for field in fields(ForwardOutput):
        ours, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(ours, other) if isinstance(ours, Tensor) else ours == other, field.name


def layer_of(kind: str, gating: dict[str, Any]) -> MoELayer:
    return MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, seed=5, gating=GatingConfig(**gating), **KINDS[kind])


def tokens(seed: int) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def garbage(draw: st.DrawFn, *shape: int) -> Tensor:
    values = st.lists(st.sampled_from(GARBAGE), min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel())
    return torch.tensor(draw(values)).view(shape)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(KINDS)), st.sampled_from(GATINGS), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_garbage_in_unused_rows_changes_nothing(data: st.DataObject, kind: str, gating: dict[str, Any], dtype: torch.dtype) -> None:
    used = torch.tensor(data.draw(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)))
    layer, clean = layer_of(kind, gating), tokens(data.draw(st.integers(0, 9))).to(dtype)
    dirty = torch.where(used[:, None], clean, garbage(data.draw, TOKENS, HIDDEN).to(dtype))
    ids = torch.arange(TOKENS) * 7
    dirty_ids = torch.where(used, ids, data.draw(st.sampled_from([-1, 2**40, -(2**63)])))
    got = layer.run(dirty, used, token_ids=dirty_ids, return_routing=True)
    assert_same(got, layer.run(clean, used, token_ids=ids, return_routing=True))
    assert not got.hidden_states[~used].any()
    assert not got.dropped_tokens[~used].any()
    assert not got.topk_weights[~used].any()
    if gating.get("routing") != "expert_choice":
        assert got.requested.sum() == layer.spec.gating.top_k * used.sum()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(["added", "residual", "identity and zero"]), st.sampled_from(GATINGS[:4]), st.booleans())
def test_garbage_where_callers_chose_nothing_changes_nothing(
    data: st.DataObject, kind: str, gating: dict[str, Any], is_small: bool
) -> None:
    """Unused rows, single choices that are none, and rows without any."""
    flags = st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)
    used, has_choice = torch.tensor(data.draw(flags)), torch.tensor(data.draw(flags))
    layer, clean = layer_of(kind, gating), tokens(data.draw(st.integers(0, 9)))
    ids = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(token))[:3] for token in range(TOKENS)])
    ids[:, 1] = torch.where(torch.tensor(data.draw(flags)), -1, ids[:, 1])
    ids[~has_choice] = -1
    weights = torch.rand(TOKENS, 3, generator=torch.Generator().manual_seed(1)) + 0.1
    reads, is_choice = used & (ids >= 0).any(dim=1), used[:, None] & (ids >= 0)
    dirty = torch.where(reads[:, None], clean, garbage(data.draw, TOKENS, HIDDEN))
    dirty_ids = torch.where(used[:, None], ids, data.draw(st.sampled_from([-9, 0, EXPERTS, 2**31 - 1])))
    dirty_weights = torch.where(is_choice, weights, garbage(data.draw, TOKENS, 3))
    dirty_ids = dirty_ids.int() if is_small else dirty_ids
    got = layer.run(dirty, used, dirty_ids, dirty_weights, return_routing=True)
    assert_same(got, layer.run(clean, used, ids.masked_fill(~is_choice, -1), weights, return_routing=True))
    assert not got.hidden_states[~reads].any()
    counted = torch.bincount(ids[is_choice], minlength=EXPERTS)
    assert torch.equal(got.requested, counted)
    assert torch.equal(got.processed + got.dropped, counted)
    assert torch.equal(got.topk_ids, ids.masked_fill(~is_choice, -1))
    assert not got.topk_weights[~is_choice].any()
    assert got.drops is not None and len(got.drops) == int(got.dropped.sum())
    assert torch.equal(got.dropped_tokens, (is_choice & (got.slots < 0)).any(dim=1))


def test_no_choice_is_as_if_the_caller_had_asked_for_less() -> None:
    layer, rows = layer_of("unequal", {}), tokens(0)
    ids = torch.tensor([[0, 3]] * TOKENS)
    weights = torch.rand(TOKENS, 2)
    first = layer.run(rows, topk_ids=ids[:, :1], topk_weights=weights[:, :1])
    ids[:, 1] = -1
    got = layer.run(rows, topk_ids=ids, topk_weights=weights)
    assert torch.equal(got.hidden_states, first.hidden_states)
    assert got.requested.tolist() == first.requested.tolist() == [TOKENS, 0, 0, 0, 0, 0]
    assert not got.dropped_tokens.any()


def test_post_drop_weights_of_a_caller_leave_no_choice_out() -> None:
    """Expert 0 has room for one of two: the second token keeps expert 2 alone, at what it gave 0 and 2; no choice adds nothing."""
    layer = layer_of("unequal", {"capacity_factor": 0.9, "renormalize": "post_drop", "top_k": 3})
    ids, weights = torch.tensor([[0, 1, -1], [0, 2, -1]]), torch.tensor([[0.5, 0.25, NAN], [0.5, 0.25, 8.0]])
    out = layer.run(tokens(0)[:2], topk_ids=ids, topk_weights=weights, return_routing=True)
    assert out.topk_weights is not None
    assert out.topk_weights.tolist() == [[0.5, 0.25, 0.0], [0.0, 0.75, 0.0]]
    assert out.dropped_tokens.tolist() == [False, True]


@pytest.mark.parametrize("gating", [{}, {"routing": "expert_choice", "capacity_factor": 1.0}, {"routing": "similarity"}], ids=str)
def test_a_batch_in_which_no_row_counts(gating: dict[str, Any]) -> None:
    out = layer_of("gated", gating).run(torch.full((3, HIDDEN), NAN), torch.zeros(3, dtype=torch.bool), return_routing=True)
    assert not out.hidden_states.any()
    assert out.requested.sum() == out.processed.sum() == 0
    assert (out.aux_loss, out.z_loss) == (0.0, 0.0)


def test_rows_that_count_are_judged_as_ever() -> None:
    layer, rows, used = layer_of("added", {}), tokens(0), torch.arange(TOKENS) < 10
    rows[[3, 11]] = NAN
    with pytest.raises(InvalidRequest, match=r"hidden_states of token 3 is not finite \(NaN or Inf\): hidden_states\[3, 0\] is nan"):
        layer.run(rows, used)
    ids, weights = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1)
    with pytest.raises(InvalidRequest, match="hidden_states of token 3"):
        layer.run(rows, used, ids, weights)
    ids[3] = -1
    assert layer.run(rows, used, ids, weights).processed.tolist() == [9, 0, 0, 0, 0, 0]


def test_a_router_looks_at_the_logits_of_used_tokens_only() -> None:
    router, rows, used = Router(torch.randn(EXPERTS, HIDDEN), GatingConfig()), tokens(0), torch.arange(TOKENS) % 2 == 0
    rows[1], rows[3] = NAN, 3e38
    got, want = (router(each, [5, TOKENS - 5], used) for each in (rows, tokens(0)))
    assert torch.equal(got.topk_weights, want.topk_weights)
    assert torch.equal(got.topk_ids[used], want.topk_ids[used])
    rows[2] = INF
    with pytest.raises(InvalidRequest, match=r"router_logits of token 2 of request 0 is not finite \(NaN or Inf\): that of expert 0 is"):
        router(rows, [5, TOKENS - 5], used)
