"""Service = layer in one process = transformers, over every channel and any number of hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from tests.support.closeness import assert_close, near
from tests.support.harness import CHANNELS, ServiceHarness

TOKENS = (0, 1, 3, 64, 1000)


@pytest.fixture(scope="module", params=[(kind, hosts) for kind in CHANNELS for hosts in (1, 3, 4)], ids=lambda p: f"{p[0]}-{p[1]}-hosts")
def service(request: pytest.FixtureRequest, tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory):
    kind, hosts = request.param
    config = {"model": {"checkpoint": tiny_moe, "dtype": "float32"}, "placement": {"num_hosts": hosts}}
    with ServiceHarness(config, kind, tmp_path_factory.mktemp("s")) as harness:
        yield harness


@pytest.fixture(scope="module")
def reference(tiny_moe: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_service_equals_layer_and_transformers(service: ServiceHarness, reference, tiny_moe: Path, num_tokens: int) -> None:
    for layer in (0, 3):
        local = MoELayer.from_checkpoint(tiny_moe, layer, dtype=torch.float32)
        hidden_states = torch.randn(num_tokens, local.spec.hidden_size, generator=torch.Generator().manual_seed(num_tokens))
        with Client(service.target) as client:
            out = client.forward(hidden_states, layer=layer, return_routing=True)
        expected = local.run(hidden_states, return_routing=True)
        assert_close(out.hidden_states, expected.hidden_states)
        for name in ("requested", "processed", "dropped", "dropped_tokens", "topk_ids"):
            assert torch.equal(getattr(out, name), getattr(expected, name)), name
        assert_close(out.topk_weights, expected.topk_weights, summed=local.spec.hidden_size + local.spec.num_experts)
        summed = num_tokens + local.spec.hidden_size + local.spec.num_experts
        assert (out.aux_loss, out.z_loss) == near((expected.aux_loss, expected.z_loss), summed)
        if num_tokens:
            with torch.no_grad():
                block = reference.model.layers[layer].mlp(hidden_states[None])
            block = block[0] if isinstance(block, tuple) else block
            assert_close(out.hidden_states, block[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_answer_has_the_dtype_of_the_request(service: ServiceHarness, tiny_moe: Path, dtype: torch.dtype) -> None:
    hidden_states = torch.randn(10, service.sources[0].spec.hidden_size).to(dtype)
    with Client(service.target) as client:
        out = client.forward(hidden_states, layer=0)
    assert out.hidden_states.dtype == dtype
    expected = MoELayer.from_checkpoint(tiny_moe, 0, dtype=torch.float32)(hidden_states.float())
    assert_close(out.hidden_states.float(), expected, rounded_to=dtype)
