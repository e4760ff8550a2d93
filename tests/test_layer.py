"""One layer in one process: its own gate or the caller's, and what becomes of every choice.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve import ConfigError, ForwardOutput, GatingConfig, InvalidRequest, MoELayer, route
from moeserve.checkpoints import layer_sources, load_bank
from moeserve.config import PlacementConfig, load_config
from moeserve.layer.dispatch import combine, permute, plan
from moeserve.placement import plan_placement
from tests.support.closeness import assert_close, near
from tests.support.odd_tensors import Elsewhere, freed
from tests.support.stacked import stacked, whole

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 8}
FREE = GatingConfig(top_k=3, renormalize="pre_drop")
TIGHT = GatingConfig(top_k=2, capacity_factor=0.75, drop_policy="choice_major")
COUNTS = ("requested", "processed", "dropped")


def some_layer(**changes: Any) -> MoELayer:
    return MoELayer(**SIZES | changes)


def some_tokens(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, SIZES["hidden_size"], generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


def logits(layer: MoELayer, hidden_states: Tensor) -> Tensor:
    return hidden_states.float() @ layer.router.gate.T


def assert_same_answer(ours: ForwardOutput, other: ForwardOutput) -> None:
    """Bit by bit: for one layer, which has computed the same rows in the same thread twice."""
    assert torch.equal(ours.hidden_states, other.hidden_states)
    for name in (*COUNTS, "dropped_tokens"):
        assert torch.equal(getattr(ours, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Elsewhere(3, 16), "is a strided Elsewhere on cpu"),
        (freed, "is a strided tensor on cpu"),
        (lambda: freed(2), "is a strided tensor on cpu"),
        (lambda: torch.zeros(3, 16, device="meta"), "is a strided tensor on meta"),
        (lambda: torch.zeros(3, 16).to_sparse(), "is a sparse_coo tensor on cpu"),
        (lambda: [[1.0] * 16], "must be a torch.Tensor, got list"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(make: Callable[[], Any], kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"hidden_states {kind}"):
        some_layer(kernel="generic").run(make())


class Named(Tensor):
    """As libraries of pictures have them: numbers like any others."""


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows.requires_grad_(),
        lambda rows: rows.requires_grad_() * 1,
        torch.nn.Parameter,
        lambda rows: rows.as_subclass(Named),
        lambda rows: torch.cat([rows, rows])[3:],
        lambda rows: torch.complex(rows, -rows).conj().imag,
        lambda rows: torch._neg_view(-rows),
        torch.inference_mode()(Tensor.clone),
    ],
)
def test_dense_tensors_of_every_kind_are_answered(make: Callable[[Tensor], Tensor]) -> None:
    layer, rows = some_layer(kernel="generic", gating=FREE), some_tokens(3)
    answer = layer.run(make(rows.clone()))
    assert_same_answer(answer, layer.run(rows))
    assert not answer.hidden_states.requires_grad


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
def test_the_answer_is_the_weighted_sum_of_the_experts(activation: str, bias: bool) -> None:
    layer = some_layer(activation=activation, bias=bias, gating=GatingConfig(top_k=3))
    hidden_states = some_tokens(20)
    weights = stacked(layer.bank.experts)
    dense = route(logits(layer, hidden_states), layer.spec.gating).dense().double()
    expected = torch.zeros(20, 16, dtype=torch.float64)
    for expert in range(8):
        hidden = hidden_states.double() @ weights.gate_up_proj[expert].double().T
        hidden = hidden if weights.gate_up_bias is None else hidden + weights.gate_up_bias[expert]
        gate, up = (hidden[:, :24], hidden[:, 24:]) if activation in ("swiglu", "geglu") else (hidden, 1.0)
        pointwise = {"swiglu": torch.nn.SiLU(), "relu": torch.nn.ReLU()}.get(activation, torch.nn.GELU())
        answer = (pointwise(gate) * up) @ weights.down_proj[expert].double().T
        answer = answer if weights.down_bias is None else answer + weights.down_bias[expert]
        expected += dense[:, expert, None] * answer
    assert_close(layer(hidden_states), expected)


def test_the_same_seed_gives_the_same_layer_and_another_one_another() -> None:
    hidden_states = some_tokens(5)
    assert_close(some_layer(seed=3)(hidden_states), some_layer(seed=3)(hidden_states))
    with pytest.raises(AssertionError):
        assert_close(some_layer(seed=3)(hidden_states), some_layer(seed=4)(hidden_states))


def test_the_same_seed_gives_the_same_layer_from_configuration() -> None:
    (source,) = layer_sources(load_config({"layers": [{**SIZES, "seed": 3}]}))
    layer = some_layer(seed=3)
    assert torch.equal(layer.router.gate, source.router().gate)
    assert torch.equal(stacked(layer.bank.experts).down_proj[[2, 5]], stacked(source.experts(whole([2, 5]))).down_proj)


@pytest.mark.parametrize("strategy", ["contiguous", "round_robin"])
@pytest.mark.parametrize("num_hosts", [1, 2, 3, 8])
def test_hosts_that_hold_a_part_each_add_up_to_the_layer(num_hosts: int, strategy: str) -> None:
    (source,) = layer_sources(load_config({"layers": [{**SIZES, "gating": {"top_k": 3, "capacity_factor": 1.0}}]}))
    placement = plan_placement([source.spec], PlacementConfig(num_hosts=num_hosts, strategy=strategy)).layers[0]
    hidden_states = some_tokens(50)
    routing = source.router()(hidden_states, [50], None)
    answers = []
    for work in plan(routing.topk_ids, routing.topk_weights, routing.kept, placement).works:
        bank = load_bank(source, placement.shards_on(work.host))
        partial = torch.empty(len(work.rows), 16)
        bank.run(permute(hidden_states, work.rows), work.row_index, work.local_experts, work.weights, out=partial)
        answers.append((work.rows, partial))
    expected = some_layer(gating=source.spec.gating)(hidden_states)
    assert_close(combine(answers, 50, 16), expected)


def test_calling_a_layer_is_running_it() -> None:
    layer, hidden_states = some_layer(), some_tokens(4)
    assert torch.equal(layer(hidden_states), layer.run(hidden_states).hidden_states)


def test_no_tokens_get_an_empty_answer() -> None:
    out = some_layer().run(some_tokens(0), used_token=torch.zeros(0, dtype=torch.bool), return_routing=True)
    assert out.hidden_states.shape == (0, 16)
    assert out.dropped_tokens.shape == (0,)
    assert [getattr(out, name).tolist() for name in COUNTS] == [[0] * 8] * 3
    assert (out.aux_loss, out.z_loss) == (0, 0)
    assert out.topk_ids is not None
    assert out.topk_ids.shape == (0, 2)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_answer_has_the_type_of_the_question(dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    layer, hidden_states = some_layer(dtype=weights_dtype), some_tokens(30, dtype)
    out = layer(hidden_states)
    assert out.dtype == dtype
    exact = some_layer()(hidden_states.float())
    coarsest = max(dtype, weights_dtype, key=lambda each: torch.finfo(each).eps)
    assert_close(out.float(), exact, rounded_to=coarsest)


@pytest.mark.parametrize("gating", [FREE, TIGHT], ids=["free", "tight"])
def test_counts_and_losses_are_those_of_the_gate(gating: GatingConfig) -> None:
    layer, hidden_states = some_layer(gating=gating), some_tokens(40)
    out = layer.run(hidden_states, return_routing=True)
    routing = route(logits(layer, hidden_states), gating)
    for name in (*COUNTS, "dropped_tokens", "topk_ids", "topk_weights"):
        assert torch.equal(getattr(out, name), getattr(routing, name)), name
    assert (out.aux_loss, out.z_loss) == near((routing.aux_loss, routing.z_loss), summed=16 + 8 + 40)


def test_routing_is_returned_only_when_asked_for() -> None:
    out = some_layer().run(some_tokens(3))
    assert out.topk_ids is None
    assert out.topk_weights is None


def test_unused_tokens_get_zeros_are_not_counted_and_take_no_room() -> None:
    layer, hidden_states = some_layer(), some_tokens(12)
    used_token = torch.tensor([True, False, True] * 4)
    out = layer.run(hidden_states, used_token=used_token)
    only_used = layer.run(hidden_states[used_token])
    assert out.hidden_states[~used_token].eq(0).all()
    assert_close(out.hidden_states[used_token], only_used.hidden_states)
    assert [getattr(out, name).tolist() for name in COUNTS] == [getattr(only_used, name).tolist() for name in COUNTS]
    assert not out.dropped_tokens.any()
    assert out.aux_loss == near(only_used.aux_loss, summed=16 + 8 + 40)


@pytest.mark.parametrize("gating", [FREE, TIGHT], ids=["free", "tight"])
def test_a_caller_who_routes_as_the_gate_does_gets_the_same_answer(gating: GatingConfig) -> None:
    layer, hidden_states = some_layer(gating=gating), some_tokens(30)
    own = layer.run(hidden_states, return_routing=True)
    undropped = route(logits(layer, hidden_states), gating.model_copy(update={"capacity_factor": None}))
    told = layer.run(hidden_states, topk_ids=undropped.topk_ids, topk_weights=undropped.topk_weights, return_routing=True)
    assert_same_answer(told, own)
    assert (told.aux_loss, told.z_loss) == (0, 0)
    assert own.topk_ids is not None
    assert told.topk_ids is not None
    assert torch.equal(told.topk_ids, own.topk_ids)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("top_k", [1, 8])
def test_a_caller_may_choose_any_number_of_experts(top_k: int, ids_dtype: torch.dtype) -> None:
    layer, hidden_states = some_layer(), some_tokens(4)
    topk_ids = torch.arange(8).repeat(4, 1)[:, :top_k].to(ids_dtype)
    out = layer.run(hidden_states, topk_ids=topk_ids, topk_weights=torch.ones(4, top_k))
    assert out.processed.tolist() == [4] * top_k + [0] * (8 - top_k)
    alone = [layer.run(hidden_states, topk_ids=topk_ids[:, [k]], topk_weights=torch.ones(4, 1)) for k in range(top_k)]
    one_by_one = torch.stack([answer.hidden_states for answer in alone]).sum(dim=0)
    assert_close(out.hidden_states, one_by_one)


def test_a_full_expert_drops_and_every_drop_is_counted() -> None:
    layer, hidden_states = some_layer(gating=GatingConfig(top_k=2, capacity_factor=1.0)), some_tokens(64)
    out = layer.run(hidden_states, return_routing=True)
    assert out.requested.sum() == 128
    assert out.processed.tolist() == [min(demand, 16) for demand in out.requested.tolist()]
    assert torch.equal(out.dropped, out.requested - out.processed)
    assert out.dropped.sum() > 0
    assert out.topk_weights is not None
    assert torch.equal(out.dropped_tokens, out.topk_weights.eq(0).any(dim=1))


def test_a_token_that_lost_every_choice_gets_zeros_and_is_reported() -> None:
    layer = some_layer(gating=GatingConfig(top_k=2, capacity_factor=0.5))
    out = layer.run(some_tokens(1).repeat(8, 1))
    assert out.hidden_states[0].ne(0).any()
    assert out.hidden_states[1:].eq(0).all()
    assert out.dropped_tokens.tolist() == [False] + [True] * 7
    assert (int(out.requested.sum()), int(out.processed.sum()), int(out.dropped.sum())) == (16, 2, 14)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 65, 200])
def test_a_tokens_answer_does_not_depend_on_its_company(num_tokens: int) -> None:
    layer, hidden_states = some_layer(), some_tokens(200)
    assert_close(layer(hidden_states[:num_tokens]), layer(hidden_states)[:num_tokens])


def test_the_question_is_left_as_it_was() -> None:
    hidden_states = some_tokens(6).requires_grad_()
    before = hidden_states.detach().clone()
    out = some_layer()(hidden_states)
    assert torch.equal(hidden_states.detach(), before)
    assert not out.requires_grad


def test_rows_need_not_lie_next_to_each_other() -> None:
    layer, wide = some_layer(), torch.randn(6, 32)
    assert torch.equal(layer(wide[:, ::2]), layer(wide[:, ::2].contiguous()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 0}, r"layers\.0\.hidden_size: .*greater than or equal to 1"),
        ({"num_experts": -1}, r"layers\.0\.num_experts: "),
        ({"activation": "tanh"}, r"layers\.0\.activation is 'tanh'; allowed: swiglu, .*, or with a limit: swiglu\(L\)"),
        ({"dtype": torch.float64}, r"dtype torch\.float64 is not supported; allowed: torch\.float32, torch\.float16, torch\.bfloat16"),
        ({"dtype": "bfloat16"}, r"dtype 'bfloat16' is not supported; allowed: torch\.float32, torch\.float16, torch\.bfloat16"),
        ({"gating": GatingConfig(top_k=9)}, r"layer layers\.0: gating\.top_k is 9, but it has 8 experts"),
    ],
)
def test_impossible_layers_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        some_layer(**changes)


def test_a_request_that_is_wrong_is_refused() -> None:
    hidden_states = some_tokens(3)
    hidden_states[1, 5] = float("nan")
    with pytest.raises(InvalidRequest, match="hidden_states of token 1 is not finite"):
        some_layer().run(hidden_states)
    with pytest.raises(InvalidRequest, match=r"layer layers\.0 takes \[tokens, 16\]"):
        some_layer().run(torch.zeros(3, 17))


def test_finite_tokens_whose_logits_are_not_are_refused() -> None:
    hidden_states = some_tokens(3)
    layer = some_layer()
    hidden_states[2] = layer.router.gate[0].sign() * 3e38
    with pytest.raises(InvalidRequest, match="router_logits of token 2 is not finite"):
        layer.run(hidden_states)
