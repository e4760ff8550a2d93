"""Checkpoints that are published in eight and four bits, against the numbers they stand for.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import CheckpointError, Client, MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import load_config
from moeserve.experts import ExpertShard
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_models import answer_of, moe_block, new_model, some_tokens
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.stacked import stacked

LAYER = "model.layers.1.mlp"
SHARDS = [{"num_hosts": 1}, {"num_hosts": 2, "tensor_parallel": 2}, {"num_hosts": 3, "tensor_parallel": 3}]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """As published: MXFP4 blocks and scales, the rest in bfloat16. H = 64 and I = 96 are whole blocks, thirds and halves of I are not."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, generator = new_model("gpt_oss", hidden_size=64, intermediate_size=96), torch.Generator().manual_seed(2)
    experts = moe_block(model, "gpt_oss").experts
    packed = {}
    for name, shape in {"gate_up_proj": (8, 192, 2), "down_proj": (8, 64, 3)}.items():
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        packed |= {f"{LAYER}.experts.{name}_blocks": blocks, f"{LAYER}.experts.{name}_scales": scales}
        getattr(experts, name).data = convert_moe_packed_tensors(blocks, scales).float()
    folder, original = (tmp_path_factory.mktemp(name) for name in ("mxfp4", "original"))
    model.save_pretrained(original)
    rest = {name: tensor for name, tensor in tensors_of(original).items() if not re.search(r"layers\.1\.mlp\.experts\.\w+_proj$", name)}
    return rewritten(original, folder, rest | packed), model


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """As published: every projection in FP8 with scales for blocks of 128 x 128, the last of which are smaller here."""
    sizes = {"hidden_size": 192, "moe_intermediate_size": 160, "n_shared_experts": 1}
    model, generator = new_model("deepseek_v3", **sizes), torch.Generator().manual_seed(2)
    folder, original = (tmp_path_factory.mktemp(name) for name in ("fp8", "original"))
    model.save_pretrained(original)
    tensors, numbers = tensors_of(original), {}
    for name in [name for name in tensors if re.search(r"layers\.1\.mlp\..*_proj\.weight$", name)]:
        stored = torch.randn(tensors[name].shape, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-stored.shape[0] // 128), -(-stored.shape[1] // 128), generator=generator) * 0.1 + 0.01
        spread = scales.repeat_interleave(128, 0)[: stored.shape[0]].repeat_interleave(128, 1)[:, : stored.shape[1]]
        tensors |= {name: stored, f"{name}_scale_inv": scales}
        numbers[name] = stored.float() * spread
    block = moe_block(model, "deepseek_v3")
    for expert in range(8):
        own = {kind: numbers[f"{LAYER}.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        block.experts.gate_up_proj.data[expert] = torch.cat([own["gate"], own["up"]])
        block.experts.down_proj.data[expert] = own["down"]
    for kind in ("gate", "up", "down"):
        getattr(block.shared_experts, f"{kind}_proj").weight.data = numbers[f"{LAYER}.shared_experts.{kind}_proj.weight"]
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return rewritten(original, folder, tensors, dtype="bfloat16", quantization_config=quantised), model


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_the_layer_equals_the_block(family: str, request: pytest.FixtureRequest) -> None:
    folder, model = request.getfixturevalue(family)
    layer = MoELayer.from_checkpoint(folder, LAYER, dtype=torch.float32)
    for num_tokens in (1, 7, 64, 513):
        hidden_states = some_tokens(num_tokens, hidden_size=layer.spec.hidden_size)
        assert_close(layer(hidden_states), answer_of(moe_block(model, family), hidden_states))
    assert MoELayer.from_checkpoint(folder, LAYER).bank.dtype == (torch.bfloat16 if family == "deepseek_v3" else torch.float32)


@pytest.mark.parametrize("placement", SHARDS, ids=str)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_behind_hosts(family: str, placement: dict[str, int], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder, model = request.getfixturevalue(family)
    config = {"model": {"checkpoint": folder, "layers": [LAYER], "dtype": "float32"}, "placement": placement}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        hidden_states = some_tokens(9, hidden_size=service.sources[0].spec.hidden_size)
        assert_close(client.forward(hidden_states, layer=0).hidden_states, answer_of(moe_block(model, family), hidden_states))


@pytest.mark.parametrize("of", [2, 5, 7])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_shards_are_slices_of_the_whole(family: str, of: int, request: pytest.FixtureRequest) -> None:
    """Wherever the cuts fall in the blocks."""
    source = layer_sources(load_config({"model": {"checkpoint": request.getfixturevalue(family)[0], "layers": [LAYER]}}))[0]
    whole = stacked(source.experts([ExpertShard(3)]))
    parts = [stacked(source.experts([ExpertShard(3, shard, of)])) for shard in range(of)]
    assert torch.equal(torch.cat([part.down_proj for part in parts], dim=2), whole.down_proj)
    for half in range(2):
        rows = torch.cat([part.gate_up_proj.chunk(2, dim=1)[half] for part in parts], dim=1)
        assert torch.equal(rows, whole.gate_up_proj.chunk(2, dim=1)[half])


def test_scales_of_the_wrong_shape(deepseek_v3: tuple[Path, Any], tmp_path: Path) -> None:
    name = f"{LAYER}.experts.2.up_proj.weight_scale_inv"
    tensors = tensors_of(deepseek_v3[0]) | {name: torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match=r"weight_scale_inv has shape \[2, 1\], config\.json says \[2, 2\]"):
        MoELayer.from_checkpoint(rewritten(deepseek_v3[0], tmp_path, tensors), LAYER)


def test_scales_that_are_not_numbers(deepseek_v3: tuple[Path, Any], tmp_path: Path) -> None:
    name = f"{LAYER}.experts.2.up_proj.weight_scale_inv"
    tensors = tensors_of(deepseek_v3[0]) | {name: torch.full((2, 2), float("nan"))}
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight holds NaN or Inf"):
        MoELayer.from_checkpoint(rewritten(deepseek_v3[0], tmp_path, tensors), LAYER)


@pytest.mark.parametrize("block", [[128], [0, 128], "128x128"])
def test_blocks_of_no_size(deepseek_v3: tuple[Path, Any], tmp_path: Path, block: object) -> None:
    folder = rewritten(deepseek_v3[0], tmp_path, tensors_of(deepseek_v3[0]), quantization_config={"weight_block_size": block})
    with pytest.raises(CheckpointError, match=r"weight_block_size is .*; allowed: two positive whole numbers"):
        MoELayer.from_checkpoint(folder, LAYER)
