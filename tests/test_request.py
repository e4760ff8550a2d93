"""Every mistake a caller can make is refused with the field's name and one sentence.

T = 3 tokens, H = 4, E = 5 experts, K = 2 choices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve import InvalidRequest
from moeserve.api.request import LayerRequest, validate
from moeserve.config import GatingConfig, LayerSpec

SPEC = LayerSpec("blocks.0", 4, 6, 5, "swiglu", False, "float32", GatingConfig())
GOOD: dict[str, Tensor] = {
    "hidden_states": torch.ones(3, 4),
    "used_token": torch.tensor([True, False, True]),
    "topk_ids": torch.tensor([[0, 4], [1, 2], [3, 0]]),
    "topk_weights": torch.full((3, 2), 0.5),
    "token_ids": torch.tensor([0, 7, 2**32 - 1]),
}
NAN, INF = float("nan"), float("inf")


def spoilt(field: str, index: tuple[int, int], value: float) -> Tensor:
    tensor = GOOD[field].clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("hidden_states", torch.ones(3, 4, dtype=torch.float64), "hidden_states is float64; allowed: float32, float16, bfloat16"),
        ("hidden_states", torch.ones(3, 4, dtype=torch.int64), "hidden_states is int64; allowed: float32, float16, bfloat16"),
        ("hidden_states", torch.ones(3, 5), "hidden_states has shape [3, 5]; layer blocks.0 takes [tokens, 4]"),
        ("hidden_states", torch.ones(4), "hidden_states has shape [4]; layer blocks.0 takes [tokens, 4]"),
        ("hidden_states", torch.ones(1, 3, 4), "hidden_states has shape [1, 3, 4]; layer blocks.0 takes [tokens, 4]"),
        ("hidden_states", torch.ones(()), "hidden_states has shape []; layer blocks.0 takes [tokens, 4]"),
        ("hidden_states", torch.ones(8, 4), "hidden_states has 8 tokens; at most 7 are allowed in one request"),
        ("hidden_states", spoilt("hidden_states", (2, 3), NAN), "token 2 is not finite (NaN or Inf): hidden_states[2, 3] is nan"),
        ("hidden_states", spoilt("hidden_states", (0, 0), INF), "token 0 is not finite (NaN or Inf): hidden_states[0, 0] is inf"),
        ("hidden_states", spoilt("hidden_states", (2, 0), -INF).half(), "hidden_states of token 2 is not finite (NaN or Inf): "),
        ("hidden_states", spoilt("hidden_states", (2, 0), NAN).bfloat16(), "hidden_states of token 2 is not finite (NaN or Inf): "),
        ("used_token", torch.ones(3), "used_token must be bool of shape [3], got float32 [3]"),
        ("used_token", torch.ones(2, dtype=torch.bool), "used_token must be bool of shape [3], got bool [2]"),
        ("used_token", torch.ones(3, 1, dtype=torch.bool), "used_token must be bool of shape [3], got bool [3, 1]"),
        ("token_ids", torch.ones(3), "token_ids is float32; allowed: int64, int32"),
        ("token_ids", torch.zeros(2, dtype=torch.int64), "token_ids has shape [2]; expected [3]"),
        ("token_ids", torch.tensor([-1, 1, 2]), "token_ids[0] is -1; allowed: 0..4294967295"),
        ("token_ids", torch.tensor([0, 1, 2**32]), "token_ids[2] is 4294967296; allowed: 0..4294967295"),
        ("topk_ids", None, "topk_ids and topk_weights must be given together; topk_ids is not given"),
        ("topk_weights", None, "topk_ids and topk_weights must be given together; topk_weights is not given"),
        ("topk_ids", GOOD["topk_ids"].float(), "topk_ids is float32; allowed: int64, int32"),
        ("topk_ids", GOOD["topk_ids"].short(), "topk_ids is int16; allowed: int64, int32"),
        ("topk_weights", GOOD["topk_weights"].double(), "topk_weights is float64; allowed: float32, float16, bfloat16"),
        ("topk_weights", GOOD["topk_ids"], "topk_weights is int64; allowed: float32, float16, bfloat16"),
        ("topk_ids", torch.zeros(2, 2, dtype=torch.int64), "must both be [3, K] with K in 1..5, got [2, 2] and [3, 2]"),
        ("topk_ids", torch.zeros(3, dtype=torch.int64), "must both be [3, K] with K in 1..5, got [3] and [3, 2]"),
        ("topk_ids", torch.zeros(3, 0, dtype=torch.int64), "must both be [3, K] with K in 1..5, got [3, 0] and [3, 2]"),
        ("topk_ids", torch.zeros(3, 6, dtype=torch.int64), "must both be [3, K] with K in 1..5, got [3, 6] and [3, 2]"),
        ("topk_ids", torch.zeros(3, 1, dtype=torch.int64), "must both be [3, K] with K in 1..5, got [3, 1] and [3, 2]"),
        ("topk_ids", spoilt("topk_ids", (2, 1), 5), "topk_ids[2, 1] is 5; layer blocks.0 has experts 0..4, and -1 is no choice"),
        ("topk_ids", spoilt("topk_ids", (2, 0), -2), "topk_ids[2, 0] is -2; layer blocks.0 has experts 0..4, and -1 is no choice"),
        ("topk_ids", spoilt("topk_ids", (0, 1), 0).int(), "topk_ids[0] names an expert twice: 0"),
        ("topk_weights", spoilt("topk_weights", (2, 1), NAN), "token 2 is not finite (NaN or Inf): topk_weights[2, 1] is nan"),
        ("topk_weights", spoilt("topk_weights", (0, 1), INF).half(), "topk_weights of token 0 is not finite (NaN or Inf)"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Tensor | None, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(LayerRequest(**GOOD | {field: value}), SPEC, max_tokens=7)
    assert sentence in str(caught.value)
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == (field, str(caught.value))


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"must both be \[3, K\] with K in 1\.\.5, got \[3, 6\] and \[3, 6\]"):
        validate(LayerRequest(**GOOD | {"topk_ids": torch.arange(6).repeat(3, 1), "topk_weights": torch.ones(3, 6)}), SPEC, max_tokens=7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"used_token": None},
        {"topk_ids": None, "topk_weights": None},
        {"topk_ids": GOOD["topk_ids"].int(), "topk_weights": GOOD["topk_weights"].bfloat16()},
        {"token_ids": torch.tensor([0, 7, 2**31 - 1], dtype=torch.int32)},
        {"topk_weights": torch.zeros(3, 2)},
        {"topk_weights": -GOOD["topk_weights"]},
        {"hidden_states": torch.ones(3, 8)[:, ::2]},
        {"hidden_states": torch.full((3, 4), 65504.0).half()},
        {"topk_ids": torch.arange(5).repeat(3, 1), "topk_weights": torch.ones(3, 5)},
    ],
)
def test_a_request_that_is_right_passes(changes: dict[str, Any]) -> None:
    validate(LayerRequest(**GOOD | changes), SPEC, max_tokens=3)


def test_what_stands_in_rows_that_do_not_count_is_taken_out() -> None:
    """Row 1 is unused, the second choice of row 0 is none, and row 2 has no choice at all."""
    request = LayerRequest(
        hidden_states=torch.tensor([[1.0] * 4, [NAN, INF, -INF, 3e38], [NAN] * 4]),
        used_token=GOOD["used_token"],
        topk_ids=torch.tensor([[4, -1], [99, -7], [-1, -1]]),
        topk_weights=torch.tensor([[0.5, NAN], [NAN, INF], [INF, 1.0]]),
        token_ids=torch.tensor([7, -5, 2**32 - 1]),
    )
    before = request.hidden_states.clone()
    clean = validate(request, SPEC, max_tokens=3)
    assert clean.hidden_states.tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]
    assert clean.topk_ids.tolist() == [[4, -1], [-1, -1], [-1, -1]]
    assert clean.topk_weights.tolist() == [[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert clean.token_ids.tolist() == [7, 0, 2**32 - 1]
    assert torch.equal(request.hidden_states.isnan(), before.isnan())


def test_nothing_is_copied_when_every_row_counts() -> None:
    request = LayerRequest(**GOOD | {"used_token": torch.ones(3, dtype=torch.bool)})
    assert validate(request, SPEC, max_tokens=3).hidden_states is request.hidden_states


def test_no_tokens_are_a_request_too() -> None:
    none = LayerRequest(torch.ones(0, 4), torch.ones(0, dtype=torch.bool), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    validate(none, SPEC, max_tokens=1)
    assert none.num_tokens == 0


def test_a_request_knows_who_routed() -> None:
    assert LayerRequest(**GOOD).is_routed
    assert not LayerRequest(GOOD["hidden_states"]).is_routed
    assert LayerRequest(GOOD["hidden_states"]).num_tokens == 3


def test_noise_in_a_routed_request_is_refused_as_nothing_would_come_of_it() -> None:
    spec = replace(SPEC, gating=GatingConfig(request_overrides=("capacity_factor", "noise")))
    validate(LayerRequest(**GOOD, capacity_factor=0.5, seed=1), spec, max_tokens=3)
    with pytest.raises(InvalidRequest, match="noise has no meaning in a request that is routed by its caller") as caught:
        validate(LayerRequest(**GOOD, noise="jitter", seed=1), spec, max_tokens=3)
    assert [violation.field for violation in caught.value.violations] == ["noise"]


def test_a_layer_that_hashes_token_ids_requires_them() -> None:
    spec = replace(SPEC, gating=GatingConfig(routing="hash"))
    with pytest.raises(InvalidRequest, match=r"token_ids is required: layer blocks\.0 routes by the token id"):
        validate(LayerRequest(GOOD["hidden_states"]), spec, 7)
    validate(LayerRequest(GOOD["hidden_states"], token_ids=GOOD["token_ids"]), spec, 7)
    validate(LayerRequest(GOOD["hidden_states"], topk_ids=GOOD["topk_ids"], topk_weights=GOOD["topk_weights"]), spec, 7)
