"""DeepSpeed's layer against its own formulas, written out densely."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeserve.compat import SYSTEMS, load
from moeserve.compat.deepspeed import MoE
from moeserve.errors import ConfigError
from tests.support.closeness import assert_close
from tests.support.compat_page import OWN

HIDDEN, EXPERTS = 12, 6


class FeedForward(nn.Module):
    """An expert that answers a tuple, as those of Megatron-LM do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 20), nn.Linear(20, HIDDEN)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.down(F.gelu(self.up(x))), None


def build(seed: int = 0, **parameters: Any) -> MoE:
    torch.manual_seed(seed)
    layer = MoE(HIDDEN, FeedForward(), **{"num_experts": EXPERTS, "use_rts": False, "top2_2nd_expert_sampling": False, **parameters}).eval()
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:  # copies of one module: make them differ
        nn.init.normal_(expert.up.weight)
    return layer


def oracle(
    layer: MoE, x: torch.Tensor, k: int, factor: float, minimum: int, drops: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, loss and counts as `top1gating`, `top2gating` and `topkgating` define them, for rows x [T, H]."""
    g = (x @ layer.deepspeed_moe.gate.wg.weight.T).softmax(1)
    ids = g.argsort(dim=1, descending=True, stable=True)[:, :k]
    mask = torch.zeros(*ids.shape, EXPERTS).scatter(2, ids[:, :, None], 1.0)
    counts = mask.sum((0, 1)).long()
    chosen = mask[:, 0] if k <= 2 else mask.sum(1) / k
    loss = EXPERTS * (g.mean(0) * chosen.mean(0)).sum()
    capacity = max(math.ceil(torch.tensor(len(x) / EXPERTS) * torch.tensor(factor * k)), minimum) if drops else len(x)
    if k == 1:
        mask = mask * (mask.cumsum(0) <= capacity)
    elif k == 2:
        second = mask[:, 1].cumsum(0) + mask[:, 0].sum(0)
        mask = mask * torch.stack([mask[:, 0].cumsum(0) <= capacity, second <= capacity], 1)
    else:
        best = (g * mask.sum(1)).topk(min(capacity, len(x)), dim=0).indices
        mask = mask * torch.zeros_like(g).scatter(0, best, 1.0)[:, None]
    weights = g * mask.sum(1)
    if k > 1:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    every = torch.stack([expert(x)[0] for expert in layer.deepspeed_moe.experts.deepspeed_experts], 1)
    return torch.einsum("te,teh->th", weights, every), loss, counts


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@torch.no_grad()
def test_output_loss_and_counts(k: int, factor: float, drops: bool) -> None:
    layer = build(k=k, eval_capacity_factor=factor, capacity_factor=9.0, min_capacity=2, drop_tokens=drops)
    x = torch.randn(2, 15, HIDDEN)
    output, l_aux, exp_counts = layer(x)
    expected = oracle(layer, x.view(-1, HIDDEN), k, factor, 2, drops)
    assert_close(output, expected[0].view_as(x))
    assert_close(l_aux, expected[1], summed=HIDDEN + EXPERTS + 30)
    assert exp_counts.tolist() == expected[2].tolist()
    assert layer.deepspeed_moe.l_aux is l_aux


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_residual(k: int) -> None:
    layer = build(k=k, use_residual=True)
    x = torch.randn(30, HIDDEN)
    share = layer.coefficient(x).softmax(1)
    expected = oracle(layer, x, k, 1.0, 4, True)[0] * share[:, :1] + layer.mlp(x)[0] * share[:, 1:]
    assert_close(layer(x)[0], expected)


def test_state_dict_keys_are_the_originals() -> None:
    keys = set(build(use_residual=True, num_experts=2).state_dict())
    parts = {f"{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")}
    experts = {f"deepspeed_moe.experts.deepspeed_experts.{index}.{part}" for index in (0, 1) for part in parts}
    assert keys == {"deepspeed_moe.gate.wg.weight", "coefficient.weight", "coefficient.bias", *(f"mlp.{part}" for part in parts), *experts}


def test_training_takes_its_own_capacity_and_gradients_reach_everything() -> None:
    layer = build(k=2, capacity_factor=9.0, eval_capacity_factor=0.5, min_capacity=0, use_residual=True)
    x = torch.randn(30, HIDDEN)
    with torch.no_grad():
        in_eval = layer(x)[0]
    output, l_aux, _ = layer.train()(x)
    assert not torch.equal(output, in_eval)
    (output.sum() + l_aux).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("policy", ["Jitter", "RSample"])
@torch.no_grad()
def test_noise_acts_in_training_only(policy: str) -> None:
    layer, x = build(noisy_gate_policy=policy, drop_tokens=False), torch.randn(30, HIDDEN)
    assert torch.equal(layer(x)[0], build(drop_tokens=False)(x)[0])  # one thread (conftest.py), one kernel: the same sums
    torch.manual_seed(1)
    first = layer.train()(x)
    assert not torch.equal(first[0], layer(x)[0])
    torch.manual_seed(1)
    assert torch.equal(first[0], layer(x)[0])


@torch.no_grad()
def test_random_token_selection_keeps_as_many_as_there_is_room_for() -> None:
    layer, x = build(use_rts=True, eval_capacity_factor=0.5, min_capacity=0), torch.randn(30, HIDDEN)
    outputs = {seed: (torch.manual_seed(seed), layer(x))[1] for seed in (1, 2)}
    kept = [int(output.any(1).sum()) for output, _, _ in outputs.values()]
    capacity = math.ceil(0.5 * 30 / EXPERTS)
    assert kept == [int(outputs[1][2].clamp(max=capacity).sum())] * 2
    assert not torch.equal(outputs[1][0], outputs[2][0])


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_unused_tokens_get_zeros_and_take_no_room(k: int) -> None:
    layer, x, used = build(k=k, drop_tokens=False), torch.randn(2, 5, HIDDEN), torch.tensor([1, 1, 0, 1, 0] * 2)
    output, _, exp_counts = layer(x, used)
    full = layer(x)[0].view(-1, HIDDEN)
    assert_close(output.view(-1, HIDDEN), full * used[:, None])
    assert exp_counts.sum() == k * used.sum()


@torch.no_grad()
def test_few_tokens_and_other_dtypes() -> None:
    layer = build(k=2).bfloat16()
    assert layer(torch.randn(1, HIDDEN, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert layer(torch.randn(0, HIDDEN, dtype=torch.bfloat16))[0].shape == (0, HIDDEN)


def test_parameters_and_defaults_are_those_of_the_table() -> None:
    table = {param.name: param.default for param in SYSTEMS["deepspeed"].params if param.name not in OWN - {"hidden_size"}}
    parameters = inspect.signature(MoE).parameters
    signature = {name: parameter.default for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY}
    assert list(table) == list(signature)
    required = ("hidden_size", "expert")
    assert {name: value for name, value in table.items() if name not in required} == {
        name: value for name, value in signature.items() if name not in required
    }


def test_it_routes_as_the_service_that_is_imported() -> None:
    layer = build(k=2, eval_capacity_factor=1.5, min_capacity=0, top2_2nd_expert_sampling=True)
    mapping = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "k": 2, "eval_capacity_factor": 1.5, "min_capacity": 0}
    assert layer.deepspeed_moe.gate.gatings[False] == load("deepspeed", mapping).config.layers[0].gating


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"k": 7}, "k is 7; allowed: 1 to num_experts = 6"),
        ({"ep_size": 4}, "ep_size is 4"),
        ({"noisy_gate_policy": "x"}, "noisy_gate_policy"),
    ],
)
def test_mistakes(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(**parameters)
    layer = MoE(HIDDEN, nn.Linear(HIDDEN, 2))
    with pytest.raises(ConfigError, match=r"expert 0 made \[1, 2\] of \[1, 12\]"):
        layer(torch.randn(1, HIDDEN))
