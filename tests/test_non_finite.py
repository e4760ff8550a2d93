"""Values that experts could not compute, or that do not fit the caller's dtype, fail the request and name who made them.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve import GatingConfig, MoELayer, NonFiniteOutput
from moeserve.api.tensors import is_finite

HIDDEN, EXPERTS = 16, 6
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts": EXPERTS}
#: finite, but its square is not: too much for experts that multiply a gate with what it gates
HUGE = 1e30


def layer(**changes: Any) -> MoELayer:
    return MoELayer(**{**SIZES, "intermediate_size": 8, **changes})


def choices(*ids: list[int]) -> dict[str, Tensor]:
    return {"topk_ids": torch.tensor(ids), "topk_weights": torch.full((len(ids), len(ids[0])), 0.5)}


def test_an_expert_that_overflows_is_named_with_its_layer_and_token() -> None:
    rows = torch.ones(3, HIDDEN)
    rows[1] = HUGE
    with pytest.raises(NonFiniteOutput) as caught:
        layer().run(rows, **choices([0, 1], [4, 2], [3, 5]))
    sentence = str(caught.value)
    assert sentence.startswith("layer layers.0: the output of token 1 is not finite (it has ")
    assert sentence.endswith("); computed by experts 2, 4")


def test_the_gate_chooses_who_is_named() -> None:
    rows = torch.ones(2, HIDDEN)
    rows[0] = HUGE
    own = layer(gating=GatingConfig(top_k=1))
    ids = own.run(rows / HUGE, return_routing=True).topk_ids  # the direction of a row decides, not its length
    assert ids is not None
    with pytest.raises(NonFiniteOutput, match=f"computed by expert {int(ids[0])}$"):
        own.run(rows)


def test_the_shared_expert_is_named_when_it_took_part() -> None:
    rows, with_shared = torch.full((1, HIDDEN), HUGE), layer(shared_expert={"intermediate_size": 4})
    with pytest.raises(NonFiniteOutput, match=r"computed by experts \d, \d and the shared expert$"):
        with_shared.run(rows)
    with pytest.raises(NonFiniteOutput, match=r"computed by expert 3$"):
        with_shared.run(rows, **choices([3]))
    dropping = layer(shared_expert={"intermediate_size": 4}, gating=GatingConfig(top_k=1, capacity_factor=0.5))
    kept = torch.ones(1, HIDDEN)
    with pytest.raises(NonFiniteOutput, match=r"token 1 .* computed by the shared expert$"):
        dropping.run(torch.cat([kept, kept * HUGE]))


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float16, 1e6), (torch.bfloat16, 3.4e38)])
def test_an_output_too_large_for_the_dtype_of_the_request_is_an_error(dtype: torch.dtype, weight: float) -> None:
    """One expert that hands its row on: the output is the weight itself."""
    given: dict[str, Any] = {"topk_ids": torch.tensor([[EXPERTS - 1]]), "topk_weights": torch.tensor([[weight]])}
    identity, row = layer(identity_experts=1), torch.ones(1, HIDDEN)
    assert identity.run(row, **given).hidden_states.eq(torch.tensor(weight)).all()
    with pytest.raises(NonFiniteOutput) as caught:
        identity.run(row.to(dtype), **given)
    name = str(dtype).removeprefix("torch.")
    assert str(caught.value) == f"layer layers.0: the output of token 0 does not fit {name} (it has {weight:g}); computed by expert 5"


@pytest.mark.parametrize(("weight", "rounded"), [(65504.0, 65504.0), (-65519.9, -65504.0)])
def test_the_largest_values_of_a_dtype_are_answers(weight: float, rounded: float) -> None:
    given: dict[str, Any] = {"topk_ids": torch.tensor([[EXPERTS - 1]]), "topk_weights": torch.tensor([[weight]])}
    assert layer(identity_experts=1).run(torch.ones(1, HIDDEN).half(), **given).hidden_states.eq(rounded).all()


def test_sums_are_made_before_they_are_rounded() -> None:
    """Two answers that do not fit float16, and whose sum does."""
    given: dict[str, Any] = {"topk_ids": torch.tensor([[4, 5]]), "topk_weights": torch.tensor([[1e6, 1 - 1e6]])}
    out = layer(identity_experts=2).run(torch.ones(1, HIDDEN).half(), **given)
    assert out.hidden_states.eq(1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (64, 129)])
def test_one_bad_element_is_found(value: float, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(-tensor)
    for index in ((0, 0), (-1, -1), (shape[0] // 2, shape[1] // 3)):
        bad = tensor.clone()
        bad[index] = value
        assert not is_finite(bad)


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, 4))
