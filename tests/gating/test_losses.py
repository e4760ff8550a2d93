"""The load-balancing losses, each as a double loop over tokens and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config import GatingConfig
from moeserve.gating import route, route_requests
from tests.support.closeness import near


def by_loop(probabilities: list[list[float]], choices: list[list[int]], num_tokens: int, num_experts: int) -> float:
    """E * sum_e (share of tokens that made one of the choices e) * (mean probability of e)."""
    if not num_tokens:
        return 0.0
    share = [sum(row.count(e) for row in choices) / num_tokens for e in range(num_experts)]
    mean = [sum(row[e] for row in probabilities) / num_tokens for e in range(num_experts)]
    return num_experts * sum(a * b for a, b in zip(share, mean, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, 9), st.integers(1, 5), st.sampled_from(["switch", "deepspeed", "deepspeed_topk", "colossalai"])
)
def test_losses(seed: int, num_tokens: int, num_experts: int, aux_loss: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, top_k = torch.randn(num_tokens, num_experts, generator=generator), 1 + seed % num_experts
    used = torch.rand(num_tokens, generator=generator) < 0.7 if seed % 2 else None
    got = route(logits, GatingConfig(top_k=top_k, aux_loss=aux_loss, capacity_factor=0.5), used)
    probabilities, ids = logits.softmax(dim=1).tolist(), got.topk_ids.tolist()
    is_used = [True] * num_tokens if used is None else used.tolist()
    choices = [row if wanted else [] for row, wanted in zip(ids, is_used, strict=True)]
    if aux_loss == "switch":
        mine = [row for row, wanted in zip(probabilities, is_used, strict=True) if wanted]
        want = by_loop(mine, choices, sum(is_used), num_experts) / top_k
    elif aux_loss == "deepspeed" and top_k <= 2:
        want = by_loop(probabilities, [row[:1] for row in choices], num_tokens, num_experts)
    else:
        want = by_loop(probabilities, choices, num_tokens, num_experts) / top_k
    assert got.aux_loss == near(want, summed=num_tokens + num_experts)


def test_colossalai_top2_by_hand() -> None:
    """g = (0.6, 0.4) and (0.2, 0.8), both tokens choose both experts: 2 * (1 * 0.4 + 1 * 0.6) / 2 = 1."""
    logits = torch.tensor([[0.6, 0.4], [0.2, 0.8]]).log()
    assert route(logits, GatingConfig(aux_loss="colossalai")).aux_loss == near(1.0, summed=2 + 2)
    # first choices only: 2 * (0.5 * 0.4 + 0.5 * 0.6) = 1 as well; a third token like the first tells them apart
    logits = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.6, 0.4]]).log()
    assert route(logits, GatingConfig(aux_loss="deepspeed")).aux_loss == near(2 * (2 / 3 * 1.4 / 3 + 1 / 3 * 1.6 / 3), summed=3 + 2)
    assert route(logits, GatingConfig(aux_loss="colossalai")).aux_loss == near(1.0, summed=3 + 2)


def test_mindformers_by_hand() -> None:
    """One token, p = (0.6, 0.4): 4 * mean(1 * 0.6, 0) = 1.2, then p = (0, 0.4): 4 * mean(0, 1 * 1) = 2."""
    logits = torch.tensor([[0.6, 0.4]]).log()
    got = route(logits, GatingConfig(routing="mindformers", aux_loss="mindformers", aux_loss_weight=0.5))
    assert got.aux_loss == near(0.5 * 3.2, summed=2 * 2)


def test_mindformers_takes_the_mean_over_its_groups() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    knobs: dict[str, Any] = {"routing": "mindformers", "aux_loss": "mindformers"}
    grouped = GatingConfig(capacity_scope="group", expert_group_size=2, **knobs)
    got = route_requests(torch.cat([logits[:2], logits]), grouped, [2, 6], None)
    parts = [route(logits[start : start + 2], GatingConfig(**knobs)).aux_loss for start in (0, 2, 4)]
    assert got.aux_loss.tolist() == near([parts[0], sum(parts) / 3], summed=2 * 3 + 3)


def test_sigmoid_scores_count_as_shares() -> None:
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    got = route(logits, GatingConfig(top_k=2, scoring_func="sigmoid"))
    scores = logits.sigmoid()
    shares = (scores / scores.sum(dim=1, keepdim=True)).tolist()
    assert got.aux_loss == near(by_loop(shares, got.topk_ids.tolist(), 7, 4) / 2, summed=7 + 4)


@pytest.mark.parametrize("hidden", range(3))
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_a_logit_that_hides_an_expert_leaves_the_z_loss_as_it_is_without_it(hidden: int, capacity_factor: float | None) -> None:
    shown, gating = torch.tensor([[1.0, 2.0], [0.5, -3.0]]), GatingConfig(top_k=1, capacity_factor=capacity_factor)
    logits = torch.cat([shown[:, :hidden], torch.full((2, 1), -1e9), shown[:, hidden:]], dim=1)
    assert route(logits, gating).z_loss == near(float(shown.double().logsumexp(dim=1).square().mean()), summed=2 + 3)


def test_a_uniform_gate_loses_one() -> None:
    for aux_loss in ("switch", "deepspeed", "deepspeed_topk", "colossalai"):
        gating = GatingConfig.model_validate({"top_k": 4, "aux_loss": aux_loss})
        assert route(torch.zeros(5, 4), gating).aux_loss == near(1.0, summed=5 + 4)
