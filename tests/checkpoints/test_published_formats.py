"""Each format that people publish checkpoints in: the layer computes with the numbers its tensors stand for, in one piece and in parts.

E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moeserve import MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.config import Quantization, load_config
from moeserve.experts import ExpertShard, FeedForward, QuantizedFeedForward
from tests.checkpoints.published import PUBLISHED
from tests.checkpoints.published_case import HIDDEN, LAYER, published_case
from tests.checkpoints.tiny_models import answer_of, some_tokens
from tests.stacked import stacked

Case = tuple[Path, nn.Module]


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return published_case(request.param, tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("quantization", [None, "none"], ids=["as published", "none"])
def test_the_layer_equals_the_block(case: Case, quantization: Quantization | None) -> None:
    folder, block = case
    layer = MoELayer.from_checkpoint(folder, LAYER, dtype=torch.float32, quantization=quantization)
    is_held = quantization is None
    assert all(isinstance(expert, QuantizedFeedForward if is_held else FeedForward) for expert in layer.bank.experts[:8])
    for num_tokens in (1, 33):
        hidden_states = some_tokens(num_tokens, hidden_size=HIDDEN)
        theirs = answer_of(block, hidden_states)
        torch.testing.assert_close(layer(hidden_states), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert MoELayer.from_checkpoint(folder, LAYER).bank.dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", [None, "none"], ids=["as published", "none"])
@pytest.mark.parametrize("of", [2, 3, 5, 7])
def test_shards_are_slices_of_the_whole(case: Case, of: int, quantization: Quantization | None) -> None:
    """Wherever the cuts fall in groups and words."""
    model = {"checkpoint": case[0], "layers": [LAYER], "dtype": "float32", "quantization": quantization}
    source = layer_sources(load_config({"model": model}))[0]
    whole = stacked(source.experts([ExpertShard(3)]))
    parts = [stacked(source.experts([ExpertShard(3, shard, of)])) for shard in range(of)]
    assert torch.equal(torch.cat([part.down_proj for part in parts], dim=2), whole.down_proj)
    for half in range(2):
        rows = torch.cat([part.gate_up_proj.chunk(2, dim=1)[half] for part in parts], dim=1)
        assert torch.equal(rows, whole.gate_up_proj.chunk(2, dim=1)[half])
