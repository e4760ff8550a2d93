"""Families of random sizes, whole and in shards, against their blocks in transformers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve import MoELayer, load_config
from moeserve.checkpoints import layer_sources
from moeserve.checkpoints.families import family_of
from moeserve.experts import ExpertShard
from tests.checkpoints.tiny_models import NESTED, SETTINGS, answer_of, moe_block, new_model, some_tokens
from tests.support.closeness import assert_close
from tests.support.stacked import stacked

#: sizes by the names they go by
EXPERTS_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
TOP_K_KEYS = {"num_experts_per_tok", "moe_k", "moe_topk"}
INTERMEDIATE_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
# Tables within tables have their own test, and SparseMixer always takes two.
DRAWN = sorted(set(SETTINGS) - {"dbrx", "phimoe", *NESTED})

# Blocks of transformers that fail on a single choice.
NEEDS_TWO = {"longcat_flash"}


@st.composite
def models(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    family = draw(st.sampled_from(DRAWN))
    own = SETTINGS[family]
    intermediate_key = next(key for key in INTERMEDIATE_KEYS if key in own)
    # Their grouped matrix product asks for rows of whole 16 bytes.
    changes: dict[str, Any] = {intermediate_key: 4 * draw(st.integers(1, 10))}
    changes |= dict.fromkeys(EXPERTS_KEYS & set(own), draw(st.sampled_from([8, 12, 16])))
    changes |= dict.fromkeys(TOP_K_KEYS & set(own), draw(st.integers(1 + (family in NEEDS_TWO), 4)))
    return family, changes


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models(), st.integers(1, 40), st.integers(2, 5))
def test_random_sizes(model_of: tuple[str, dict[str, Any]], num_tokens: int, parts: int) -> None:
    family, changes = model_of
    model = new_model(family, **changes)
    name = family_of(family).layer_name.format(index=1)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hidden_states = some_tokens(num_tokens)
        theirs = answer_of(moe_block(model, family), hidden_states)
        ours = MoELayer.from_checkpoint(folder, name)(hidden_states)
        assert_close(ours, theirs)

        (source,) = layer_sources(load_config({"model": {"checkpoint": Path(folder), "layers": [name]}}))
        whole = stacked(source.experts([ExpertShard(1)]))
        shards = [stacked(source.experts([ExpertShard(1, shard, parts)])) for shard in range(parts)]
        assert torch.equal(torch.cat([shard.down_proj for shard in shards], dim=2), whole.down_proj)
        if whole.down_bias is not None:
            biases = [shard.down_bias for shard in shards if shard.down_bias is not None]
            assert torch.equal(torch.stack(biases).sum(dim=0), whole.down_bias)
