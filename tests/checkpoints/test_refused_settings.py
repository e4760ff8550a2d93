"""What a config.json may say that is not served: one sentence that names the key. And keys that go by another name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeserve import CheckpointError, load_config
from moeserve.checkpoints import LayerSource, layer_sources
from tests.checkpoints.saved import rewritten, saved, tensors_of


def layers(family: str, folder: Path, **config: Any) -> list[LayerSource]:
    return layer_sources(load_config(rewritten(saved(family), folder, tensors_of(saved(family)), **config)))


FFN = {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3}


@pytest.mark.parametrize(
    ("family", "config", "sentence"),
    [
        ("gpt_oss", {"swiglu_limit": 0.0}, r"config\.json: swiglu_limit must be a positive number, but is 0\.0"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, r"config\.json: swiglu_alpha is 1\.0; supported: 1\.702"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            r'config\.json: topk_method must be one of greedy, group_limited_greedy, but is "noaux_tc"',
        ),
        ("deepseek_v3", {"n_group": 9, "topk_group": 10}, r"config\.json: topk_group must be at most n_group = 9, but is 10"),
        (
            "lfm2_moe",
            {"use_expert_bias": False},
            r"use_expert_bias is false, but a lfm2_moe model with the tensors of this folder has true",
        ),
        (
            "dbrx",
            {"ffn_config": FFN | {"moe_normalize_expert_weights": 2.0}},
            r"expert_weights is 2\.0; supported: 1 or null",
        ),
        ("dbrx", {"ffn_config": FFN | {"ffn_act_fn": {"name": "gelu"}}}, r'ffn_config\.ffn_act_fn is {"name": "gelu"}; supported'),
        ("dbrx", {"ffn_config": {}}, r"config\.json: ffn_config\.ffn_hidden_size must be a positive whole number, but is missing"),
        ("dbrx", {"ffn_config": None}, r"config\.json: ffn_config\.ffn_hidden_size must be a positive whole number, but is missing"),
        ("qwen3_moe", {"mlp_only_layers": 5}, r"config\.json: mlp_only_layers must be a list of layer numbers, but is 5"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"config\.json: decoder_sparse_step must be a positive whole number, but is 0"),
        (
            "mellum",
            {"mlp_layer_types": ["sparse"]},
            r'mlp_layer_types must be a list of dense or sparse for each of the 2 layers, but is \["sparse"\]',
        ),
        (
            "hunyuan_v1_moe",
            {"moe_topk": [3, 0]},
            r"moe_topk must be a positive whole number, or a list of one for each of the 2 layers, but is \[3, 0\]",
        ),
        ("granitemoe", {"hidden_act": "relu"}, r'hidden_act must be one of silu, swish, gelu, gelu_pytorch_tanh, but is "relu"'),
        ("ernie4_5_moe", {"moe_norm_min": 0.5}, r"config\.json: moe_norm_min must be at most 1e-06, but is 0\.5"),
        ("phimoe", {"num_experts_per_tok": 3}, r"config\.json: num_experts_per_tok must be 2, as many as SparseMixer chooses, but is 3"),
        ("deepseek_v3", {"n_group": 3, "topk_group": 2}, r"n_group and topk_group do not fit: .* is 3, which does not divide .* 8 experts"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, r"n_group and topk_group do not fit: .* needs two experts in a group"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 1}, r"n_group and topk_group do not fit: .* leaves 2 experts to choose from"),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba"] * 4097},
            r"config\.json: layers_block_type has something for each of 4097 layers; allowed: at most 4096",
        ),
        ("llama4", {"text_config": {}}, r"config\.json: num_hidden_layers must be a positive whole number, but is missing"),
    ],
)
def test_settings_that_are_not_served(family: str, config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        layers(family, tmp_path, **config)


def test_a_key_without_which_a_family_is_nothing(tmp_path: Path) -> None:
    folder = rewritten(saved("qwen2_moe"), tmp_path, tensors_of(saved("qwen2_moe")))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"shared_expert_intermediate_size"', '"other"'))
    with pytest.raises(CheckpointError, match=r"config\.json: shared_expert_intermediate_size must be .*, but is missing"):
        layer_sources(load_config(folder))


def test_a_number_for_every_layer(tmp_path: Path) -> None:
    assert [source.spec.gating.top_k for source in layers("hunyuan_v1_moe", tmp_path, moe_topk=[3, 5])] == [3, 5]


def test_dbrx_without_renormalisation(tmp_path: Path) -> None:
    told = layers("dbrx", tmp_path, ffn_config=FFN | {"moe_normalize_expert_weights": None})
    assert {source.spec.gating.renormalize for source in told} == {"none"}
    assert {source.spec.gating.renormalize for source in layers("dbrx", tmp_path, ffn_config=FFN)} == {"pre_drop"}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_of_the_config_wins_over_that_of_the_files(key: str, tmp_path: Path) -> None:
    config = {"dtype": None, key: "bfloat16"}
    assert {source.spec.dtype for source in layers("mixtral", tmp_path, **config)} == {"bfloat16"}


def test_without_it_the_files_tell(tmp_path: Path) -> None:
    assert {source.spec.dtype for source in layers("mixtral", tmp_path, dtype=None)} == {"float32"}
    assert {source.spec.dtype for source in layers("mixtral", tmp_path, dtype="float8")} == {"float32"}
