"""model.deterministic: what a token is answered is bitwise the same whatever else is in its batch. T tokens, H hidden size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError, GatingConfig, MoELayer
from moeserve.kernels import InvariantLinear
from tests.support.closeness import assert_close

H = 96
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "torch": {"kernel": "torch"},
    "generic": {"kernel": "generic"},
    "int8": {"quantization": "int8", "dtype": torch.bfloat16},
    "sigmoid": {"gating": GatingConfig(top_k=2, scoring_func="sigmoid", renormalize="pre_drop")},
    "groups": {
        "gating": GatingConfig(
            top_k=4, scoring_func="sigmoid", num_expert_groups=4, topk_groups=2, group_score="top2_sum", renormalize="pre_drop"
        )
    },
    "softplus": {"gating": GatingConfig(top_k=2, scoring_func="sqrt_softplus", renormalize="pre_drop", routed_scaling_factor=1.7)},
    "sparsemixer": {"gating": GatingConfig(top_k=2, routing="sparsemixer")},
    "shared": {"shared_expert": {"intermediate_size": 40, "mixing": "sigmoid"}},
    "residual": {"shared_expert": {"intermediate_size": 64, "mixing": "residual"}, "identity_experts": 1},
    "inputs": {"gating": GatingConfig(top_k=2, scale_inputs=True)},
    "module": {"expert": "torch.nn:Linear", "expert_args": {"in_features": H, "out_features": H}, "intermediate_size": None},
}


@pytest.fixture(scope="module", params=KINDS)
def layer(request: pytest.FixtureRequest) -> MoELayer:
    sizes = {"hidden_size": H, "intermediate_size": 64, "num_experts": 8, "gating": GatingConfig(top_k=3)}
    return MoELayer(**{**sizes, **KINDS[request.param]}, deterministic=True)


@given(tokens=st.integers(1, 300), seed=st.integers(0, 99), threads=st.integers(1, 2))
@settings(deadline=None, max_examples=10)
def test_an_answer_does_not_depend_on_its_company(layer: MoELayer, tokens: int, seed: int, threads: int) -> None:
    hidden_states = torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed))
    together = layer.run(hidden_states, return_routing=True)
    torch.set_num_threads(threads)
    try:
        for token in {0, tokens // 2, tokens - 1}:
            alone = layer.run(hidden_states[token : token + 1], return_routing=True)
            assert torch.equal(alone.hidden_states[0], together.hidden_states[token])
            assert alone.topk_weights is not None
            assert together.topk_weights is not None
            assert torch.equal(alone.topk_weights[0], together.topk_weights[token])
    finally:
        torch.set_num_threads(2)


@given(tokens=st.integers(0, 70), inputs=st.integers(1, 100), outputs=st.integers(1, 70), bias=st.booleans())
@settings(deadline=None, max_examples=50)
def test_an_invariant_linear_map_is_a_linear_map(tokens: int, inputs: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight, rows = torch.randn(outputs, inputs, generator=generator), torch.randn(tokens, inputs, generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    linear = InvariantLinear(weight, added)
    expected = torch.nn.functional.linear(rows.double(), weight.double(), None if added is None else added.double())
    assert_close(linear(rows), expected, summed=inputs)
    for row in range(tokens):
        assert torch.equal(linear(rows[row : row + 1])[0], linear(rows)[row])


def test_what_depends_on_company_by_itself_is_refused() -> None:
    gating = GatingConfig(routing="similarity", top_k=1)
    with pytest.raises(ConfigError, match=r"model.deterministic is true, but gating.routing is 'similarity'"):
        MoELayer(hidden_size=8, intermediate_size=8, num_experts=2, gating=gating, deterministic=True)
