"""Each format that people publish checkpoints in: the layer computes with the numbers its tensors stand for, in one piece and in parts.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeserve import Client, MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import Quantization, load_config
from moeserve.experts import ExpertShard, FeedForward, QuantizedFeedForward
from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.published_case import HIDDEN, LAYER
from tests.checkpoints.published_case import published_case as case
from tests.checkpoints.tiny_models import answer_of, some_tokens
from tests.support.closeness import assert_close
from tests.support.harness import ServiceHarness
from tests.support.stacked import stacked


@pytest.mark.parametrize("quantization", [None, "none"], ids=["as published", "none"])
@pytest.mark.parametrize("title", PUBLISHED)
def test_the_layer_equals_the_block(title: str, quantization: Quantization | None) -> None:
    folder, block = case(title)
    layer = MoELayer.from_checkpoint(folder, LAYER, dtype=torch.float32, quantization=quantization)
    kind = QuantizedFeedForward if quantization is None else FeedForward
    assert all(isinstance(expert, kind) for expert in layer.bank.experts[:8])
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


@pytest.mark.parametrize("quantization", [None, "none"], ids=["as published", "none"])
@pytest.mark.parametrize("of", [2, 3, 5, 7])
@pytest.mark.parametrize("title", PUBLISHED)
def test_shards_are_slices_of_the_whole(title: str, of: int, quantization: Quantization | None) -> None:
    """Wherever the cuts fall in groups and words."""
    model = {"checkpoint": case(title)[0], "layers": [LAYER], "dtype": "float32", "quantization": quantization}
    source = layer_sources(load_config({"model": model}))[0]
    whole = stacked(source.experts([ExpertShard(3)]))
    parts = [stacked(source.experts([ExpertShard(3, shard, of)])) for shard in range(of)]
    assert torch.equal(torch.cat([part.down_proj for part in parts], dim=2), whole.down_proj)
    for half in range(2):
        rows = torch.cat([part.gate_up_proj.chunk(2, dim=1)[half] for part in parts], dim=1)
        assert torch.equal(rows, whole.gate_up_proj.chunk(2, dim=1)[half])
