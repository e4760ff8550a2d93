"""What one request says about its routing: service = layer in one process = `moeserve.route` with that configuration.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moeserve import Client, ForwardOutput, GatingConfig, InvalidRequest, MoELayer, Routing, route
from moeserve.api.request import LayerRequest
from moeserve.cli.app import main
from tests.support.closeness import assert_close, near
from tests.support.harness import ServiceHarness

H, E = 16, 8
SIZES: dict[str, Any] = {"hidden_size": H, "intermediate_size": 8, "num_experts": E}
BOTH = ("capacity_factor", "noise")
#: the gating of each served layer, in order
GATINGS: list[dict[str, Any]] = [
    {"routing": "hash", "top_k": 2},
    {"top_k": 2, "drop_policy": "choice_major", "request_overrides": BOTH},
    {"top_k": 2, "noise": "jitter", "noise_scale": 0.4, "seed": 5, "capacity_factor": 1.0, "request_overrides": BOTH},
    {"top_k": 2, "capacity_factor": 0.5, "drop_policy": "probs"},
    {"routing": "expert_choice", "capacity_factor": 1.0, "request_overrides": ("capacity_factor",)},
]
HASH, DROPLESS, JITTER, FIXED, EXPERT_CHOICE = range(5)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    layers = [{**SIZES, "seed": n, "gating": gating} for n, gating in enumerate(GATINGS)]
    with ServiceHarness({"layers": layers, "placement": {"num_hosts": 2}}, "local", tmp_path_factory.mktemp("s")) as harness:
        yield harness


@pytest.fixture(scope="module")
def client(service: ServiceHarness) -> Iterator[Client]:
    with Client(service.target) as client:
        yield client


def layer_with(number: int, **knobs: Any) -> MoELayer:
    """Layer `number`, as its operator might have configured it."""
    return MoELayer(**SIZES, seed=number, gating=GatingConfig(**{**GATINGS[number], **knobs}))


def tokens(num_tokens: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(seed))


def routed(layer: MoELayer, x: torch.Tensor, token_ids: torch.Tensor | None = None) -> Routing:
    return route(F.linear(x, layer.router.gate), layer.router.gating, token_ids=token_ids, hidden_states=x)


def assert_same(got: ForwardOutput, want: ForwardOutput) -> None:
    assert_close(got.hidden_states, want.hidden_states)
    for name in ("requested", "processed", "dropped", "dropped_tokens", "topk_ids", "slots", "drop_reasons"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert_close(got.topk_weights, want.topk_weights, summed=H + E)
    assert got.drops == want.drops
    assert (got.aux_loss, got.z_loss) == near((want.aux_loss, want.z_loss), summed=H + E + len(got.hidden_states))


def assert_routed(got: ForwardOutput, want: Routing) -> None:
    assert torch.equal(got.topk_ids, want.topk_ids)
    assert_close(got.topk_weights, want.topk_weights, summed=H + E)
    assert torch.equal(got.slots, want.slots)
    assert got.drops == want.drops
    assert len(want.drops) == int(want.dropped.sum())
    assert torch.equal(got.processed, want.processed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_ids_reach_the_hash(client: Client, dtype: torch.dtype) -> None:
    x, layer = tokens(), layer_with(HASH)
    token_ids = torch.randint(0, 2**31 if dtype is torch.int32 else 2**32, (40,), generator=torch.Generator().manual_seed(1)).to(dtype)
    out = client.forward(x, layer=HASH, token_ids=token_ids, return_routing=True)
    assert_same(out, layer.run(x, token_ids=token_ids, return_routing=True))
    assert_routed(out, routed(layer, x, token_ids))
    with pytest.raises(InvalidRequest, match="token_ids is required"):
        client.forward(x, layer=HASH)


@pytest.mark.parametrize("number", [DROPLESS, JITTER, FIXED, EXPERT_CHOICE])
def test_slots_and_drops_are_those_of_the_gate(client: Client, number: int) -> None:
    x, used_token = tokens(), torch.arange(40) % 5 != 0
    layer = layer_with(number)
    out = client.forward(x, layer=number, used_token=used_token, return_routing=True)
    assert_same(out, layer.run(x, used_token, return_routing=True))
    routing = layer.router(x * used_token[:, None], [40], used_token).request(0)
    assert_routed(out, routing)
    assert bool(routing.drops) == (number in {JITTER, FIXED})
    plain = client.forward(x, layer=number)
    assert (plain.slots, plain.drop_reasons, plain.drops) == (None, None, None)


@pytest.mark.parametrize("factor", [0.5, 1.2, 100.0, math.inf])
def test_a_capacity_factor_acts_as_if_configured(client: Client, factor: float) -> None:
    x = tokens()
    configured = layer_with(DROPLESS, capacity_factor=None if factor == math.inf else factor)
    out = client.forward(x, layer=DROPLESS, capacity_factor=factor, return_routing=True)
    assert_same(out, configured.run(x, return_routing=True))
    assert_same(out, layer_with(DROPLESS).run(x, return_routing=True, capacity_factor=factor))
    assert_routed(out, routed(configured, x))
    assert bool(out.drops) == (factor < 2)


def test_infinity_lifts_the_limit_of_the_layer(client: Client) -> None:
    assert client.forward(tokens(), layer=JITTER).dropped.sum() > 0
    assert client.forward(tokens(), layer=JITTER, capacity_factor=math.inf).dropped.sum() == 0


def test_a_capacity_factor_limits_what_callers_routed(client: Client) -> None:
    ids, weights = torch.tensor([[0, 1]]).repeat(40, 1), torch.full((40, 2), 0.5)
    out = client.forward(tokens(), layer=DROPLESS, topk_ids=ids, topk_weights=weights, capacity_factor=0.5, return_routing=True)
    assert out.processed.tolist() == [5, 5] + [0] * 6
    assert_same(out, layer_with(DROPLESS, capacity_factor=0.5).run(tokens(), None, ids, weights, return_routing=True))


@pytest.mark.parametrize("noise", ["jitter", "rsample", "gumbel_second", "normal", "uniform"])
def test_noise_with_a_seed_is_reproducible_and_as_if_configured(client: Client, noise: str) -> None:
    x = tokens(200)
    one, again, other = (
        client.forward(x, layer=DROPLESS, noise=noise, seed=seed, return_routing=True, capacity_factor=0.5) for seed in (3, 3, 4)
    )
    assert_same(one, again)
    assert not torch.equal(one.topk_weights, other.topk_weights)
    assert not torch.equal(one.topk_weights, client.forward(x, layer=DROPLESS, return_routing=True, capacity_factor=0.5).topk_weights)
    configured = layer_with(DROPLESS, noise=noise, seed=3, capacity_factor=0.5)
    assert_same(one, configured.run(x, return_routing=True))
    if noise != "jitter":
        assert_routed(one, routed(configured, x))


def test_a_seed_alone_keeps_the_noise_of_the_layer(client: Client) -> None:
    x = tokens()
    out = client.forward(x, layer=JITTER, seed=9, return_routing=True)
    assert_same(out, layer_with(JITTER, seed=9).run(x, return_routing=True))
    calm = client.forward(x, layer=JITTER, noise="none", return_routing=True)
    assert_same(calm, layer_with(JITTER, noise="none", noise_scale=None).run(x, return_routing=True))


def test_what_is_not_allowed_is_refused_by_service_and_layer_alike(client: Client) -> None:
    x, token_ids = tokens(), torch.arange(40)
    for number, changes in ((FIXED, {"capacity_factor": 2.0}), (EXPERT_CHOICE, {"noise": "jitter", "seed": 1}), (HASH, {"seed": 1})):
        with pytest.raises(InvalidRequest, match="request_overrides") as of_service:
            client.forward(x, layer=number, token_ids=token_ids, **changes)
        with pytest.raises(InvalidRequest) as of_layer:
            layer_with(number).run(x, token_ids=token_ids, **changes)
        assert (str(of_service.value), of_service.value.violations) == (str(of_layer.value), of_layer.value.violations)


CHANGES: list[dict[str, Any]] = [
    {},
    {"capacity_factor": 0.5},
    {"capacity_factor": math.inf},
    {"capacity_factor": 0.5, "noise": "rsample", "seed": 1},
    {"noise": "rsample", "seed": 2},
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([DROPLESS, JITTER]), st.integers(1, 30), st.sampled_from(CHANGES)), min_size=2, max_size=12))
def test_an_answer_does_not_depend_on_company(service: ServiceHarness, crowd: list[tuple[int, int, dict[str, Any]]]) -> None:
    async def together() -> list[ForwardOutput]:
        # All are admitted before any is answered: the first two of a layer run alone, what can be joined of the others is.
        requests = [LayerRequest(tokens(size, seed=n), return_routing=True, **changes) for n, (_, size, changes) in enumerate(crowd)]
        numbers = [number for number, _, _ in crowd]
        return await asyncio.gather(*map(service.frontend.forward, numbers, requests))

    answers = service.call(together())
    for n, ((number, size, changes), answer) in enumerate(zip(crowd, answers, strict=True)):
        assert_same(answer, layer_with(number).run(tokens(size, seed=n), return_routing=True, **changes))


def test_the_shell_says_it_too(service: ServiceHarness, tmp_path: Path) -> None:
    x, ids = tokens(), torch.arange(40)
    save_file({"hidden_states": x, "token_ids": ids}, tmp_path / "x.safetensors")

    def infer(number: int, *options: str) -> dict[str, torch.Tensor]:
        files = ("--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors"))
        assert main(["infer", service.target, "--layer", str(number), "--return-routing", *files, *options]) == 0
        return load_file(tmp_path / "y.safetensors")

    hashed, want = infer(HASH), layer_with(HASH).run(x, token_ids=ids, return_routing=True)
    assert torch.equal(hashed["topk_ids"], want.topk_ids)
    noisy = infer(DROPLESS, "--capacity-factor", "0.5", "--noise", "rsample", "--seed", "3")
    want = layer_with(DROPLESS, capacity_factor=0.5, noise="rsample", seed=3).run(x, return_routing=True)
    for name in ("topk_ids", "slots", "drop_reasons", "dropped"):
        assert torch.equal(noisy[name], getattr(want, name)), name
    assert infer(JITTER, "--capacity-factor", "inf")["dropped"].sum() == 0
