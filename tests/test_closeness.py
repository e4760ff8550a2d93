"""The bound of the tests: every order of the same sums is within it, every mistake beyond."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeserve import GatingConfig, MoELayer
from moeserve.experts import ExpertBank
from tests.support.closeness import assert_close, near
from tests.support.stacked import Stacked, stacked

HIDDEN, INTERMEDIATE, EXPERTS = 64, 96, 8
ROWS = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))


def layer(dtype: torch.dtype = torch.float32) -> MoELayer:
    return MoELayer(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=EXPERTS, gating=GatingConfig(top_k=2), dtype=dtype)


def changed(change: Callable[[Stacked], Stacked]) -> Tensor:
    """The answer of the layer with other weights."""
    other = layer()
    other.bank = ExpertBank(change(stacked(other.bank.experts)).experts("swiglu"), HIDDEN, torch.float32)
    return other(ROWS)


def in_another_order(weights: Stacked) -> Stacked:
    order = torch.randperm(INTERMEDIATE, generator=torch.Generator().manual_seed(1))
    return Stacked(weights.gate_up_proj[:, torch.cat([order, order + INTERMEDIATE])], weights.down_proj[:, :, order])


def one_of_another_sign(weights: Stacked) -> Stacked:
    weights.down_proj[3, 5, 7] *= -1
    return weights


def two_experts_exchanged(weights: Stacked) -> Stacked:
    return weights._replace(down_proj=weights.down_proj[[1, 0, *range(2, EXPERTS)]])


def without(choice: int) -> Tensor:
    """The answer when one token loses one of its choices."""
    out = layer().run(ROWS, return_routing=True)
    assert out.topk_ids is not None and out.topk_weights is not None
    weights = out.topk_weights.clone()
    weights[17, choice] = 0
    return layer().run(ROWS, topk_ids=out.topk_ids, topk_weights=weights).hidden_states


@pytest.mark.parametrize("threads", [1, 2])
def test_another_order_of_the_sums_is_close(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert_close(changed(in_another_order), layer()(ROWS))
    torch.set_num_threads(before)
    assert_close(torch.cat([layer()(row[None]) for row in ROWS]), layer()(ROWS))


@pytest.mark.parametrize("terms", [1, 9, 200, 3000])
def test_the_worst_order_of_a_long_sum_is_close(terms: int) -> None:
    """One term after the other, in float32."""
    products = torch.randn(32, 10, terms, generator=torch.Generator().manual_seed(terms))
    total = torch.zeros(32, 10)
    for term in range(terms):
        total += products[:, :, term]
    assert_close(total, products.double().sum(dim=2), summed=terms)
    assert float(total.abs().sum()) == near(float(products.double().sum(dim=2).abs().sum()), summed=terms + 320)


MISTAKES: dict[str, Callable[[], Tensor]] = {
    "one weight of another sign": lambda: changed(one_of_another_sign),
    "two experts exchanged": lambda: changed(two_experts_exchanged),
    "the first choice of one token dropped": lambda: without(0),
    "the second choice of one token dropped": lambda: without(1),
    "weights in bfloat16": lambda: layer(torch.bfloat16)(ROWS),
    "weights in float16": lambda: layer(torch.float16)(ROWS),
    "rows in bfloat16": lambda: layer()(ROWS.bfloat16().float()),
    "the answer in bfloat16": lambda: layer()(ROWS).bfloat16().float(),
    "the answer in float16": lambda: layer()(ROWS).half().float(),
    "one row that is NaN": lambda: layer()(ROWS).index_fill(0, torch.tensor([4]), torch.nan),
    "one row that was not computed": lambda: layer()(ROWS).index_fill(0, torch.tensor([4]), 0.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_not(mistake: str) -> None:
    with pytest.raises(AssertionError, match=r"rows, the largest by"):
        assert_close(MISTAKES[mistake](), layer()(ROWS))


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if "float16" not in name and "sign" not in name])
def test_nor_where_narrow_types_are_rounded_to(mistake: str) -> None:
    assert_close(layer(torch.bfloat16)(ROWS), layer()(ROWS), rounded_to=torch.bfloat16)
    assert_close(layer(torch.float16)(ROWS), layer()(ROWS), rounded_to=torch.float16)
    with pytest.raises(AssertionError):
        assert_close(MISTAKES[mistake](), layer()(ROWS), rounded_to=torch.bfloat16)


def test_what_is_zero_has_no_error() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert_close(rows, rows)
    with pytest.raises(AssertionError):
        assert_close(rows + torch.tensor([[1e-9], [0]]), rows)


def test_sums_so_long_that_bfloat16_would_pass_are_refused() -> None:
    with pytest.raises(AssertionError, match="so many terms"):
        assert_close(ROWS, ROWS, summed=5000)
