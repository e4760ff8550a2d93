"""Each format that people publish checkpoints in: the layer computes with the numbers its tensors stand for, in one piece and in parts.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from moeserve import MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import load_config
from moeserve.experts import ExpertShard
from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.saved import rewritten, tensors_of
from tests.checkpoints.tiny_models import answer_of, moe_block, new_model, some_tokens
from tests.stacked import stacked

LAYER = "model.layers.1.mlp"
HIDDEN, INTERMEDIATE = 128, 192
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}

Case = tuple[Path, nn.Module]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    new_model("qwen2_moe", **SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint in the format, and the block of transformers that has its numbers."""
    published, generator = PUBLISHED[request.param], torch.Generator().manual_seed(3)
    tensors, numbers = tensors_of(original), {}
    for name in [name for name in tensors if re.search(r"layers\.1\.mlp\.(shared_expert|experts\.\d+)\.\w+\.weight$", name)]:
        module = name.removesuffix(".weight")
        if "shared_expert" in name and "expert_dtype" in published.quantization_config:
            numbers[name] = tensors[name]
            continue
        stored, numbers[name] = published.write(module, tuple(tensors.pop(name).shape), generator)
        tensors |= stored
    folder = tmp_path_factory.mktemp("published")
    rewritten(original, folder, tensors, dtype="bfloat16", quantization_config=published.quantization_config)
    model = new_model("qwen2_moe", **SIZES)
    block = moe_block(model, "qwen2_moe")
    for expert in range(8):
        own = {kind: numbers[f"{LAYER}.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        block.experts.gate_up_proj.data[expert] = torch.cat([own["gate"], own["up"]])
        block.experts.down_proj.data[expert] = own["down"]
    for kind in ("gate", "up", "down"):
        getattr(block.shared_expert, f"{kind}_proj").weight.data = numbers[f"{LAYER}.shared_expert.{kind}_proj.weight"]
    return folder, block


def test_the_layer_equals_the_block(case: Case) -> None:
    folder, block = case
    layer = MoELayer.from_checkpoint(folder, LAYER, dtype=torch.float32)
    for num_tokens in (1, 33):
        hidden_states = some_tokens(num_tokens, hidden_size=HIDDEN)
        theirs = answer_of(block, hidden_states)
        torch.testing.assert_close(layer(hidden_states), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert MoELayer.from_checkpoint(folder, LAYER).bank.dtype == torch.bfloat16


@pytest.mark.parametrize("of", [2, 3, 5, 7])
def test_shards_are_slices_of_the_whole(case: Case, of: int) -> None:
    """Wherever the cuts fall in groups and words."""
    source = layer_sources(load_config({"model": {"checkpoint": case[0], "layers": [LAYER], "dtype": "float32"}}))[0]
    whole = stacked(source.experts([ExpertShard(3)]))
    parts = [stacked(source.experts([ExpertShard(3, shard, of)])) for shard in range(of)]
    assert torch.equal(torch.cat([part.down_proj for part in parts], dim=2), whole.down_proj)
    for half in range(2):
        rows = torch.cat([part.gate_up_proj.chunk(2, dim=1)[half] for part in parts], dim=1)
        assert torch.equal(rows, whole.gate_up_proj.chunk(2, dim=1)[half])
