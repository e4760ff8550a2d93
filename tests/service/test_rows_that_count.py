"""Engines pad batches: what stands in rows that do not count is ignored on every way into the service.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeserve import Client, ForwardOutput, MoELayer, connect_experts
from moeserve.api.wire import WireRequest
from moeserve.cli.app import main
from moeserve.compat.deepspeed import MoE
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness, received

HIDDEN, EXPERTS, TOKENS = 16, 6, 10
NAN = float("nan")
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_experts": EXPERTS}
LAYERS: list[dict[str, Any]] = [
    {**SIZES, "shared_expert": {"intermediate_size": 4, "mixing": "residual"}, "gating": {"capacity_factor": 0.7, "drop_policy": "probs"}},
    {**SIZES, "identity_experts": 1, "zero_experts": 1, "gating": {"drop_policy": "random", "capacity_factor": 0.5, "seed": 2}},
    {**SIZES, "gating": {"routing": "expert_choice", "capacity_factor": 1.0}},
    {**SIZES, "gating": {"routing": "hash", "top_k": 2}},
    {**SIZES, "gating": {"noise": "jitter", "seed": 3, "aux_loss": "deepspeed"}},
]
HASH = 3
USED = torch.arange(TOKENS) % 3 != 1
IDS = torch.arange(TOKENS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    config = {"layers": LAYERS, "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "shm", tmp_path_factory.mktemp("s")) as harness:
        yield harness


@pytest.fixture(scope="module")
def client(service: ServiceHarness) -> Iterator[Client]:
    with Client(service.target) as client:
        yield client


def rows(padding: float = 0.0, num_tokens: int = TOKENS) -> Tensor:
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    return hidden_states.masked_fill(torch.arange(num_tokens)[:, None] % 3 == 1, padding)


def routed(padding: int, weight: float) -> dict[str, Tensor]:
    """Two choices a token, of which the second is none for every other one."""
    ids = torch.stack([IDS % EXPERTS, (IDS + 1) % EXPERTS], dim=1)
    ids[::2, 1] = -1
    weights = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(1)).masked_fill(ids < 0, weight)
    return {"topk_ids": ids.masked_fill(~USED[:, None], padding), "topk_weights": weights.masked_fill(~USED[:, None], weight)}


def assert_same(left: ForwardOutput, right: ForwardOutput) -> None:
    """To the bit."""
    for field in fields(ForwardOutput):
        ours, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(ours, other) if isinstance(ours, Tensor) else ours == other, field.name


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, len(LAYERS) - 1),
    st.lists(st.sampled_from([NAN, torch.inf, -torch.inf, 3e38, 7.0]), min_size=HIDDEN, max_size=HIDDEN),
    st.sampled_from([-1, 2**40]),
)
def test_the_gate_of_the_service(client: Client, layer: int, padding: list[float], padding_id: int) -> None:
    dirty, dirty_ids = rows(), IDS.masked_fill(~USED, padding_id)
    dirty[~USED] = torch.tensor(padding)
    got = client.forward(dirty, layer=layer, used_token=USED, token_ids=dirty_ids, return_routing=True)
    assert_same(got, client.forward(rows(), layer=layer, used_token=USED, token_ids=IDS, return_routing=True))
    assert not got.hidden_states[~USED].any()
    expected = MoELayer(**LAYERS[layer]).run(dirty, USED, token_ids=dirty_ids)
    assert_close(got.hidden_states, expected.hidden_states)
    assert torch.equal(got.requested, expected.requested)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
@pytest.mark.parametrize(("padding", "weight"), [(-1, NAN), (-7, torch.inf), (EXPERTS, 0.5), (0, NAN)])
def test_choices_of_the_caller(client: Client, layer: int, padding: int, weight: float) -> None:
    got = client.forward(rows(NAN), layer=layer, used_token=USED, **routed(padding, weight), return_routing=True)
    assert_same(got, client.forward(rows(), layer=layer, used_token=USED, **routed(-1, 0.0), return_routing=True))
    assert got.requested.sum() == (routed(-1, 0.0)["topk_ids"] >= 0).sum()


def test_the_answer_of_a_batch_of_padding_is_zero(service: ServiceHarness, client: Client) -> None:
    used, before = torch.zeros(TOKENS, dtype=torch.bool), sum(received(host) for host in service.hosts)
    for layer in range(len(LAYERS)):
        out = client.forward(torch.full((TOKENS, HIDDEN), NAN), layer=layer, used_token=used, token_ids=IDS)
        assert not out.hidden_states.any()
        assert out.requested.sum() == 0
    assert sum(received(host) for host in service.hosts) == before


def test_streams_and_batches(client: Client) -> None:
    """Padded requests of many lengths, joined with others as they come."""
    requests = [WireRequest(rows(NAN, n), 0, torch.arange(n) % 3 != 1, request_id=str(n)) for n in range(1, 40)]
    alone = {str(n): client.forward(rows(0.0, n), layer=0, used_token=torch.arange(n) % 3 != 1) for n in range(1, 40)}
    for answer in client.forward_stream(requests):
        assert isinstance(answer.result, ForwardOutput)
        assert_close(answer.result.hidden_states, alone[answer.request_id].hidden_states)


def test_from_the_shell(service: ServiceHarness, client: Client, tmp_path: Path) -> None:
    save_file({"hidden_states": rows(NAN), "used_token": USED, **routed(-1, NAN)}, tmp_path / "x.safetensors")
    files = ("--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "y.safetensors"))
    assert main(["infer", service.target, "--layer", "0", "--return-routing", *files]) == 0
    got, want = load_file(tmp_path / "y.safetensors"), client.forward(rows(), used_token=USED, **routed(-1, 0.0), return_routing=True)
    for name in ("hidden_states", "requested", "dropped_tokens", "topk_ids", "topk_weights"):
        assert torch.equal(got[name], getattr(want, name)), name


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_a_layer_of_deepspeed_here_and_with_its_experts_there(k: int, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_experts": EXPERTS, "k": k, "use_rts": False, "top2_2nd_expert_sampling": False}
    layer = MoE(HIDDEN, nn.Sequential(nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, HIDDEN)), **shape).eval()
    layer.save(tmp_path / "saved")
    want = layer(rows(), USED)
    with ServiceHarness({"model": {"checkpoint": tmp_path / "saved"}}, "local", tmp_path) as service:
        remote = MoE(HIDDEN, nn.Identity(), **shape, target=service.target).eval()
        remote.load_state_dict({"deepspeed_moe.gate.wg.weight": layer.deepspeed_moe.gate.wg.weight})
        for answer in (layer(rows(NAN), USED), remote(rows(NAN), USED)):
            assert_close(answer[0], want[0])
            assert torch.isfinite(answer[1])
            assert answer[2].tolist() == want[2].tolist()


@torch.no_grad()
def test_experts_of_a_transformers_model(tiny_moe: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_moe, experts_implementation="moeserve", dtype=torch.float32).eval()
    config = {"model": {"checkpoint": tiny_moe, "dtype": "float32"}, "placement": {"num_hosts": 2}}
    with ServiceHarness(config, "shm", tmp_path) as service, connect_experts(model, service.target):
        experts, width = model.model.layers[0].mlp.experts, model.config.hidden_size
        x = torch.randn(4, width)
        ids, weights = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 0]]), torch.rand(4, 2)
        clean = experts(x[[0, 3]], ids[[0, 3]], weights[[0, 3]])
        x[2], weights[1, 1], weights[2] = NAN, NAN, torch.inf
        got = experts(x, ids, weights)
        assert_close(got[[0, 3]], clean)
        assert_close(got[1:2], experts(x[1:2], ids[1:2, :1], weights[1:2, :1]))
        assert not got[2].any()
