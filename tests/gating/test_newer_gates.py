"""Tables of token ids, selection by logits, soft caps and gates of callers, against their definition.

T tokens, V token ids, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeserve import ConfigError, GatingConfig, InvalidRequest, route

E, K, V = 8, 3, 20


def logits_of(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, E, generator=torch.Generator().manual_seed(seed)) * 3


def table_of(seed: int = 0) -> Tensor:
    return torch.rand(V, E, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, :K]


@given(
    st.integers(0, 30),
    st.integers(0, 2**16),
    st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
    st.sampled_from(["none", "pre_drop"]),
)
def test_the_experts_of_a_token_are_those_of_its_id(num_tokens: int, seed: int, scoring: Any, renormalize: Any) -> None:
    gating = GatingConfig(top_k=K, routing="token_table", scoring_func=scoring, renormalize=renormalize)
    logits, table = logits_of(num_tokens, seed), table_of(seed)
    token_ids = torch.randint(V, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    routing = route(logits, gating, token_ids=token_ids, token_experts=table)
    assert torch.equal(routing.topk_ids, table[token_ids])
    scores = {
        "softmax": lambda x: x.softmax(dim=1),
        "sigmoid": torch.sigmoid,
        "sqrt_softplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }[scoring](logits)
    weights = scores.gather(1, table[token_ids])
    expected = weights / (weights.sum(dim=1, keepdim=True) + 1e-20) if renormalize == "pre_drop" else weights
    torch.testing.assert_close(routing.topk_weights, expected)


def test_weights_of_the_chosen_logits_alone() -> None:
    gating = GatingConfig(top_k=K, routing="token_table", scoring_func="softmax_topk")
    logits, table, token_ids = logits_of(9), table_of(), torch.arange(9)
    routing = route(logits, gating, token_ids=token_ids, token_experts=table)
    torch.testing.assert_close(routing.topk_weights, logits.gather(1, table[:9]).softmax(dim=1))


@pytest.mark.parametrize("token_id", [-1, V, 2**32 - 1])
def test_an_id_beyond_the_table(token_id: int) -> None:
    gating, token_ids = GatingConfig(top_k=K, routing="token_table"), torch.tensor([0, token_id])
    with pytest.raises(InvalidRequest, match=rf"token_ids has {token_id}; this layer knows 0\.\.{V - 1}"):
        route(logits_of(2), gating, token_ids=token_ids, token_experts=table_of())
    used = route(logits_of(2), gating, torch.tensor([True, False]), token_ids=token_ids, token_experts=table_of())
    assert used.processed.sum() == K


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (None, "needs token_experts"),
        (torch.zeros(V, K, dtype=torch.int64), r"of token id 0 are \[0, 0, 0\]; allowed: distinct experts in 0\.\.7"),
        (torch.tensor([[0, 1, 2], [3, 4, 8]]), r"of token id 1 are \[3, 4, 8\]; allowed"),
        (torch.zeros(V, 2, dtype=torch.int64), r"must be whole numbers \[token ids, top_k = 3\], got torch.int64 \[20, 2\]"),
        (torch.zeros(V, K), r"must be whole numbers .* got torch.float32"),
    ],
)
def test_a_table_that_is_none(table: Tensor | None, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        route(logits_of(2), GatingConfig(top_k=K, routing="token_table"), token_ids=torch.tensor([0, 1]), token_experts=table)


def test_ids_are_required() -> None:
    with pytest.raises(InvalidRequest, match="token_ids is required"):
        route(logits_of(2), GatingConfig(top_k=K, routing="token_table"), token_experts=table_of())


@given(st.integers(1, 30), st.integers(0, 2**16))
def test_chosen_by_logits_and_weighed_by_scores(num_tokens: int, seed: int) -> None:
    logits = logits_of(num_tokens, seed)
    bias = torch.randn(E, generator=torch.Generator().manual_seed(seed)) * 2
    routing = route(logits, GatingConfig(top_k=K, scoring_func="sigmoid", rank_by="logits"), score_correction_bias=bias)
    chosen = (logits + bias).argsort(dim=1, descending=True, stable=True)[:, :K]
    assert torch.equal(routing.topk_ids, chosen)
    torch.testing.assert_close(routing.topk_weights, logits.sigmoid().gather(1, chosen))


def test_the_bias_on_scores_chooses_others() -> None:
    bias = torch.linspace(-2, 2, E)
    by = {
        rank: route(logits_of(64), GatingConfig(scoring_func="sigmoid", rank_by=rank), score_correction_bias=bias).topk_ids
        for rank in ("scores", "logits")
    }
    assert not torch.equal(by["scores"], by["logits"])


@given(st.floats(0.1, 100), st.integers(0, 2**16))
def test_a_soft_cap(cap: float, seed: int) -> None:
    logits = logits_of(20, seed)
    capped, plain = route(logits, GatingConfig(logit_softcap=cap)), route((logits / cap).tanh() * cap, GatingConfig())
    assert torch.equal(capped.topk_ids, plain.topk_ids)
    assert torch.equal(capped.topk_weights, plain.topk_weights)


def test_a_gate_of_callers() -> None:
    with pytest.raises(InvalidRequest, match="topk_ids is required: this layer is routed by its callers"):
        route(logits_of(2), GatingConfig(routing="caller"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank_by": "logits", "routing": "hash"}, r"gating\.rank_by = 'logits' has no meaning with gating\.routing = 'hash'"),
        (
            {"routing": "caller", "scoring_func": "sigmoid"},
            r"gating\.scoring_func = 'sigmoid' has no meaning with gating\.routing = 'caller'",
        ),
        ({"routing": "caller", "noise": "normal", "seed": 1}, r"gating\.noise = 'normal' has no meaning with gating\.routing = 'caller'"),
        ({"routing": "token_table", "noise": "rsample", "seed": 1}, r"gating\.noise = 'rsample' acts on learned routing only"),
        ({"logit_softcap": 0.0}, "greater than 0"),
    ],
)
def test_impossible_combinations(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GatingConfig(**settings)
