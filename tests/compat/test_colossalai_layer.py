"""ColossalAI's routers and layer against their formulas, written out densely."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeserve.compat import SYSTEMS, load
from moeserve.compat.colossalai import Experts, MoeLayer, NormalNoiseGenerator, Top1Router, Top2Router, UniformNoiseGenerator
from moeserve.errors import ConfigError
from tests.support.closeness import assert_close, near

HIDDEN, EXPERTS = 12, 5
ROUTERS = {1: Top1Router, 2: Top2Router}


def oracle(logits: torch.Tensor, k: int, factor: float, minimum: int, drops: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine weights [T, E, C] and loss as the two routers define them, with select_policy "first"."""
    g = logits.softmax(1)
    ids = g.argsort(dim=1, descending=True, stable=True)[:, :k]
    masks = F.one_hot(ids, EXPERTS).permute(1, 0, 2)
    loss = EXPERTS * (g.mean(0) * masks.sum(0).float().mean(0)).sum() / k
    rows = math.floor(k * factor * len(logits) / EXPERTS)
    capacity = max(rows + rows % 2, minimum) if drops else int(masks.sum((0, 1)).max())
    weights = torch.zeros(len(logits), EXPERTS, capacity)
    taken = [0] * EXPERTS
    for mask in masks:
        for token, expert in enumerate(mask.argmax(1).tolist()):
            if taken[expert] < capacity:
                weights[token, expert, taken[expert]] = g[token, expert]
            taken[expert] += 1
    return weights, loss


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("factor", "minimum"), [(0.5, 0), (1.0, 4), (2.0, 4), (9.0, 0)])
@pytest.mark.parametrize("k", [1, 2])
def test_routers(k: int, factor: float, minimum: int, drops: bool) -> None:
    router = ROUTERS[k](capacity_factor_train=7.0, capacity_factor_eval=factor, min_capacity=minimum, drop_tks=drops).eval()
    logits = 2 * torch.randn(23, EXPERTS, generator=torch.Generator().manual_seed(k))
    weights, mask = router(logits)
    expected, loss = oracle(logits, k, factor, minimum, drops)
    assert_close(weights.flatten(1), expected.flatten(1), summed=EXPERTS)
    assert torch.equal(mask, expected.bool())
    assert_close(router.pop_routing_loss(), loss, summed=EXPERTS + len(logits))


def layer_of(router: nn.Module, seed: int = 0) -> MoeLayer:
    torch.manual_seed(seed)
    return MoeLayer(HIDDEN, EXPERTS, router, Experts(nn.Linear, EXPERTS, in_features=HIDDEN, out_features=HIDDEN))  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_layer(k: int) -> None:
    layer = layer_of(ROUTERS[k](capacity_factor_eval=0.8, min_capacity=0)).eval()
    x = torch.randn(2, 10, HIDDEN)
    answer, loss = layer(x)
    rows = x.view(-1, HIDDEN)
    weights, expected_loss = oracle(rows @ layer.gate_weight.T, k, 0.8, 0, True)
    every = torch.stack([expert(rows) for expert in layer.experts.experts], 1)
    assert_close(answer, torch.einsum("tec,teh->th", weights, every).view_as(x))
    assert_close(loss, expected_loss, summed=HIDDEN + EXPERTS + len(rows))


def test_by_hand() -> None:
    # 4 tokens, 2 experts, K = 1, factor 1: C = floor(1 * 4 / 2) = 2, even. Tokens 0-2 want expert 0, so token 2 is dropped.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    router = Top1Router(capacity_factor_eval=1.0, min_capacity=0).eval()
    weights, _ = router(logits)
    assert_close(weights.sum(2), torch.tensor([[0.75, 0.0], [0.75, 0.0], [0.0, 0.0], [0.0, 0.75]]), summed=2)
    # E * sum(mean g * mean m) = 2 * (0.625 * 0.75 + 0.375 * 0.25)
    assert router.pop_routing_loss().item() == near(1.125, summed=4 + 2)


def test_training_takes_its_own_capacity_and_noise_and_gradients_reach_everything() -> None:
    layer = layer_of(
        Top2Router(capacity_factor_train=9.0, capacity_factor_eval=0.2, min_capacity=0, noisy_func=NormalNoiseGenerator(EXPERTS))
    )
    x = torch.randn(20, HIDDEN)
    first, loss = layer.train()(x)
    assert not torch.equal(first, layer(x)[0])
    (first.sum() + loss).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


def test_drop_tks_lifts_the_limit_in_eval_only() -> None:
    router, logits = Top1Router(capacity_factor_train=0.5, min_capacity=0, drop_tks=False), torch.randn(20, EXPERTS)
    assert int(router.eval()(logits)[1].sum()) == 20
    assert int(router.train()(logits)[1].sum()) < 20


def test_random_selection_fills_the_capacity() -> None:
    router = Top1Router(capacity_factor_eval=1.0, min_capacity=0, select_policy="random").eval()
    logits = torch.zeros(20, EXPERTS)  # all want expert 0, which takes floor(20 / 5) = 4
    masks = [(torch.manual_seed(seed), router(logits)[1])[1] for seed in (1, 2, 1)]
    assert [int(mask.sum()) for mask in masks] == [4, 4, 4]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert Top1Router(select_policy="random").eval()(torch.randn(3, EXPERTS))[1].sum() == 3  # capacity above T


def test_noise_generators() -> None:
    torch.manual_seed(0)
    zeros, ones = torch.zeros(4000, 8), torch.ones(4000, 8)
    # The deviation of n draws is off by about 1 / sqrt(2 n); five times that.
    assert NormalNoiseGenerator(8)(zeros).std().item() == pytest.approx(1 / 64, rel=5 / (2 * zeros.numel()) ** 0.5)
    shaken = UniformNoiseGenerator(0.1)(ones)
    assert 0.9 <= shaken.min() < 0.91 and 1.09 < shaken.max() <= 1.1


def test_experts_are_made_by_the_name_of_the_original() -> None:
    experts = Experts(expert_cls=nn.Linear, num_experts=5, in_features=HIDDEN, out_features=HIDDEN)
    assert [type(each) for each in experts.experts] == [nn.Linear] * 5
    assert experts.expert_args == {"in_features": HIDDEN, "out_features": HIDDEN}
    with pytest.raises(ConfigError, match="Experts has expert_cls None and num_experts 5; allowed: a class, at least 1"):
        Experts(num_experts=5)


def test_state_dict_keys_are_the_originals() -> None:
    experts = {f"experts.experts.{index}.{kind}" for index in range(EXPERTS) for kind in ("weight", "bias")}
    assert set(layer_of(Top1Router()).state_dict()) == {"gate_weight", *experts}


@pytest.mark.parametrize("router", [Top1Router, Top2Router])
def test_parameters_and_defaults_are_those_of_the_table(router: type[nn.Module]) -> None:
    table = {param.name: param.default for param in SYSTEMS["colossalai"].params}
    defaults = {name: parameter.default for name, parameter in inspect.signature(router).parameters.items()}
    defaults.pop("select_policy", None)  # unset in the table, for Top2Router has none
    assert {name: table[name] for name in defaults} == defaults


@pytest.mark.parametrize("k", [1, 2])
def test_it_routes_as_the_service_that_is_imported(k: int) -> None:
    mapping = {"router": f"Top{k}Router", "num_experts": EXPERTS, "dim_model": HIDDEN}
    assert ROUTERS[k]().gatings[False] == load("colossalai", mapping).config.layers[0].gating


@pytest.mark.parametrize(
    ("parameters", "sentence"), [({"select_policy": "last"}, "select_policy is 'last'"), ({"min_capacity": -1}, "min_capacity is -1")]
)
def test_mistakes(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Top1Router(**parameters)
    with pytest.raises(ConfigError, match="num_experts is 3; allowed: 5"):
        MoeLayer(HIDDEN, 3, Top1Router(), Experts(nn.Linear, 5, in_features=HIDDEN, out_features=HIDDEN))
    with pytest.raises(ConfigError, match="no routing loss"):
        Top1Router().pop_routing_loss()
    with pytest.raises(ConfigError, match="use_kernel"):
        Top1Router()(torch.zeros(1, 2), use_kernel=True)
