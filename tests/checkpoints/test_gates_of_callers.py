"""Families whose gate stays with the model: their experts against those of transformers, for choices a caller brings.

T tokens, K choices per token.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from moeserve import CheckpointError, Client, ConfigError, GatingConfig, InvalidRequest, MoELayer, load_model
from moeserve.checkpoints.families import family_of
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_configs import BASE, DEEPSEEK, EXPERTS, INTERMEDIATE, MOE
from tests.support.harness import ServiceHarness

SETTINGS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        **BASE,
        **MOE,
        "enable_moe_block": True,
        "top_k_experts": 3,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 16,
    },
    "inkling_text": {
        **BASE,
        "intermediate_size": 40,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "d_rel": 4,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "zaya": {**BASE, **MOE, "num_attention_heads": 4, "num_experts_per_tok": 1, "head_dim": 16, "router_hidden_size": 8},
    # Nemotron 3 Super: experts of a latent size.
    "nemotron_h": {
        **BASE,
        **DEEPSEEK,
        "layers_block_type": ["full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 56,
        "moe_latent_size": 16,
        "head_dim": 16,
    },
}


@cache
def model_of(family: str) -> tuple[Any, Path]:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SETTINGS[family])).eval()
    folder = Path(mkdtemp(prefix=f"tiny-{family}-"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model, folder


def choices(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :3]
    return ids, torch.rand(num_tokens, 3, generator=generator)


@pytest.mark.parametrize("family", SETTINGS)
def test_the_experts_equal_those_of_the_model(family: str) -> None:
    model, folder = model_of(family)
    name = family_of(family).layer_name.format(index=1)
    layer = MoELayer.from_checkpoint(folder, name)
    experts = dict(model.named_modules())[f"{name}.experts"]
    hidden_states = torch.randn(33, layer.spec.hidden_size, generator=torch.Generator().manual_seed(7))
    ids, weights = choices(33)
    with torch.inference_mode():
        theirs = experts(hidden_states, ids, weights)
    ours = layer.run(hidden_states, topk_ids=ids, topk_weights=weights).hidden_states
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    with pytest.raises(InvalidRequest, match=r"topk_ids is required: layer .* is routed by its callers"):
        layer(hidden_states)


@pytest.mark.parametrize("num_hosts", [1, 3])
@pytest.mark.parametrize("family", SETTINGS)
def test_the_whole_model(family: str, num_hosts: int, tmp_path: Path) -> None:
    local, folder = model_of(family)
    prompt = torch.randint(3, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": num_hosts}}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client, torch.no_grad():
        remote = load_model(folder, client, dtype=torch.float32)
        torch.testing.assert_close(remote(input_ids=prompt).logits, local(input_ids=prompt).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(InvalidRequest, match="topk_ids is required"):
            client.forward(torch.zeros(1, client.layers()[0].hidden_size), layer=0)
        assert all(layer.tokens > 0 for layer in client.stats().layers)


def test_a_model_without_experts(tmp_path: Path) -> None:
    _, folder = model_of("gemma4_text")
    with pytest.raises(CheckpointError, match="none of the layers is an MoE layer"):
        MoELayer.from_checkpoint(rewritten(folder, tmp_path, tensors_of(folder), enable_moe_block=False))


@pytest.mark.parametrize("family", SETTINGS)
def test_no_other_gate_is_made_up(family: str) -> None:
    _, folder = model_of(family)
    with pytest.raises(ConfigError, match=r"gating\.routing is 'learned', but its gate stays with the model; allowed: caller, hash, "):
        MoELayer.from_checkpoint(folder, gating=GatingConfig(routing="learned"))
    layer = MoELayer.from_checkpoint(folder, gating=GatingConfig(routing="least_loaded"))
    assert layer(torch.zeros(2, layer.spec.hidden_size)).shape == (2, layer.spec.hidden_size)
