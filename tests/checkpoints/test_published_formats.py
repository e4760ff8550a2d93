"""Each format that people publish checkpoints in: the layer computes with the numbers its tensors stand for, in one piece and in parts.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import atexit
import re
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
import torch
from torch import nn

from moeserve import Client, MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import load_config
from moeserve.experts import ExpertShard
from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_models import answer_of, moe_block, new_model, some_tokens
from tests.closeness import assert_close
from tests.harness import ServiceHarness
from tests.stacked import stacked

LAYER = "model.layers.1.mlp"
HIDDEN, INTERMEDIATE = 128, 192
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}

Case = tuple[Path, nn.Module]


def in_a_new_folder(name: str) -> Path:
    folder = Path(mkdtemp(prefix=name))
    atexit.register(rmtree, folder)
    return folder


@cache
def original() -> Path:
    folder = in_a_new_folder("original-")
    new_model("qwen2_moe", **SIZES).save_pretrained(folder)
    return folder


@cache
def case(title: str) -> Case:
    """A checkpoint in the format, and the block of transformers that has its numbers."""
    published, generator = PUBLISHED[title], torch.Generator().manual_seed(3)
    tensors, numbers = tensors_of(original()), {}
    for name in [name for name in tensors if re.search(r"layers\.1\.mlp\.(shared_expert|experts\.\d+)\.\w+\.weight$", name)]:
        if "shared_expert" in name and "expert_dtype" in published.quantization_config:
            numbers[name] = tensors[name]
            continue
        shape = tensors.pop(name).shape
        stored, numbers[name] = published.write(name.removesuffix(".weight"), (shape[0], shape[1]), generator)
        tensors |= stored
    settings = published.quantization_config
    folder = rewritten(original(), in_a_new_folder("published-"), tensors, dtype="bfloat16", quantization_config=settings)
    block = moe_block(new_model("qwen2_moe", **SIZES), "qwen2_moe")
    for expert in range(8):
        own = {kind: numbers[f"{LAYER}.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        block.experts.gate_up_proj.data[expert] = torch.cat([own["gate"], own["up"]])
        block.experts.down_proj.data[expert] = own["down"]
    for kind in ("gate", "up", "down"):
        getattr(block.shared_expert, f"{kind}_proj").weight.data = numbers[f"{LAYER}.shared_expert.{kind}_proj.weight"]
    return folder, block


@pytest.mark.parametrize("title", PUBLISHED)
def test_the_layer_equals_the_block(title: str) -> None:
    folder, block = case(title)
    layer = MoELayer.from_checkpoint(folder, LAYER, dtype=torch.float32)
    for num_tokens in (1, 33):
        hidden_states = some_tokens(num_tokens, hidden_size=HIDDEN)
        assert_close(layer(hidden_states), answer_of(block, hidden_states))
    assert MoELayer.from_checkpoint(folder, LAYER).bank.dtype == torch.bfloat16


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("title", ["gptq, desc_act", "awq", "compressed-tensors packed INT4 with zeros", "modelopt NVFP4"])
def test_behind_hosts_that_share_every_expert(title: str, shards: int, tmp_path: Path) -> None:
    folder, block = case(title)
    config = {
        "model": {"checkpoint": folder, "layers": [LAYER], "dtype": "float32"},
        "placement": {"num_hosts": shards, "tensor_parallel": shards},
    }
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        hidden_states = some_tokens(9, hidden_size=HIDDEN)
        assert_close(client.forward(hidden_states, layer=0).hidden_states, answer_of(block, hidden_states))


@pytest.mark.parametrize("of", [2, 3, 5, 7])
@pytest.mark.parametrize("title", PUBLISHED)
def test_shards_are_slices_of_the_whole(title: str, of: int) -> None:
    """Wherever the cuts fall in groups and words."""
    source = layer_sources(load_config({"model": {"checkpoint": case(title)[0], "layers": [LAYER], "dtype": "float32"}}))[0]
    whole = stacked(source.experts([ExpertShard(3)]))
    parts = [stacked(source.experts([ExpertShard(3, shard, of)])) for shard in range(of)]
    assert torch.equal(torch.cat([part.down_proj for part in parts], dim=2), whole.down_proj)
    for half in range(2):
        rows = torch.cat([part.gate_up_proj.chunk(2, dim=1)[half] for part in parts], dim=1)
        assert torch.equal(rows, whole.gate_up_proj.chunk(2, dim=1)[half])
