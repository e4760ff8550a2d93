"""Noise and chance: off by default, the same for the same seed and request, and of the distribution that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve import InvalidRequest
from moeserve.config import GatingConfig
from moeserve.gating import Router, route, route_requests
from tests.support.closeness import assert_close

KNOBS: list[dict[str, Any]] = [
    {"noise": "jitter", "noise_scale": 0.5},
    {"noise": "rsample"},
    {"noise": "gumbel_second"},
    {"noise": "normal", "noise_scale": 1.0},
    {"noise": "uniform", "noise_scale": 0.9},
    {"drop_policy": "random", "capacity_factor": 0.5},
    {"routing": "random"},
]


def hidden_states(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0))


def gate() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_a_seed_makes_chance_repeat_itself_whatever_the_company(knobs: dict[str, Any]) -> None:
    one, two, x = Router(gate(), GatingConfig(seed=3, **knobs)), Router(gate(), GatingConfig(seed=4, **knobs)), hidden_states(40)
    alone = one(x, [40], None).request(0)
    in_company = one(torch.cat([hidden_states(7), x]), [7, 40], None).request(1)
    assert torch.equal(alone.topk_ids, in_company.topk_ids)
    assert torch.equal(alone.kept, in_company.kept)
    assert_close(alone.dense(), in_company.dense(), summed=8 + 6)
    assert torch.equal(one(x, [40], None).topk_weights, alone.topk_weights)  # one thread (conftest.py), the same shapes: the same sums
    assert not torch.equal(two(x, [40], None).request(0).dense(), alone.dense())


@pytest.mark.parametrize("knobs", KNOBS[1:], ids=str)
def test_a_generator_takes_the_place_of_the_seed(knobs: dict[str, Any]) -> None:
    logits, gating = hidden_states(40), GatingConfig(seed=3, **knobs)
    seeded = route(logits, gating)
    assert torch.equal(route(logits, gating, generator=torch.Generator().manual_seed(3)).dense(), seeded.dense())
    assert not torch.equal(route(logits, gating, generator=torch.Generator().manual_seed(9)).dense(), seeded.dense())


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_noise_that_is_too_large_for_float32_is_never_routed(noise: str) -> None:
    gating = GatingConfig.model_validate({"noise": noise, "noise_scale": 1e39, "seed": 0})
    with pytest.raises(InvalidRequest, match=r"router_logits of token 0 is not finite"):
        route(hidden_states(5), gating)


def test_selection_noise_leaves_the_weights_alone() -> None:
    logits = hidden_states(500)
    for noise in ("rsample", "gumbel_second"):
        got = route(logits, GatingConfig.model_validate({"noise": noise, "seed": 0}))
        assert_close(got.topk_weights, logits.softmax(dim=1).gather(1, got.topk_ids), summed=logits.shape[1])
        first = logits.argmax(dim=1)
        assert torch.equal(got.topk_ids[:, 0], first) == (noise == "gumbel_second")
        assert (got.topk_ids[:, 0] != got.topk_ids[:, 1]).all()


def test_rsample_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(20_000, 1)
    got = route(logits, GatingConfig(top_k=1, noise="rsample", seed=0))
    shares = torch.tensor([0.5, 0.3, 0.2])
    # A share p of n draws is off by about sqrt(p (1 - p) / n); five times that.
    assert ((got.requested / 20_000 - shares).abs() < 5 * (shares * (1 - shares) / 20_000).sqrt()).all()


def test_logit_noise_is_as_large_as_told() -> None:
    logits, draws = torch.full((2000, 4), 2.0), 8000
    normal = route_logits(logits, GatingConfig(noise="normal", seed=0))
    # 1 / E^2; of n draws the deviation is off by about 1 / sqrt(2 n), the mean by 1 / sqrt(n) deviations; five times that.
    assert float(normal.std()) == pytest.approx(1 / 16, rel=5 / (2 * draws) ** 0.5)
    assert float(normal.mean()) == pytest.approx(2.0, abs=5 / 16 / draws**0.5)
    uniform = route_logits(logits, GatingConfig(noise="uniform", seed=0))
    assert 1.98 <= float(uniform.min()) < 1.981
    assert 2.019 < float(uniform.max()) <= 2.02


def route_logits(logits: Tensor, gating: GatingConfig) -> Tensor:
    from moeserve.gating.chance import Chance
    from moeserve.gating.noise import shake_logits

    return shake_logits(logits, gating, Chance([len(logits)], logits.device, gating.seed, None))


def test_random_drops_keep_as_many_and_are_fair() -> None:
    gating = GatingConfig(top_k=1, capacity_factor=0.5, drop_policy="random", seed=0)
    got = route_requests(torch.zeros(400, 1), gating, [400], None)
    assert got.processed.tolist() == [[200]]
    assert 70 < int(got.kept[:200].sum()) < 130
    assert got.slots[got.kept].tolist() == list(range(200))  # in token order, as DeepSpeed fills its buffers
