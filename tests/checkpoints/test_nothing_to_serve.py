"""Folders that have no MoE layer, or not yet their files, say so, whatever else is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from moeserve import CheckpointError, load_config
from moeserve.checkpoints import layer_sources
from moeserve.cli.app import main
from tests.checkpoints.saved import config_of, saved, tensors_of
from tests.checkpoints.tiny_models import SETTINGS, tiny_model
from tests.support.checkpoints_on_disk import CONFIG, layer_tensors, write_folder

#: a dense decoder of two layers, as many families name its tensors
DENSE_TENSORS = {
    f"model.layers.{index}.{part}.weight": torch.zeros(2, 2)
    for index in range(2)
    for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "feed_forward.w1", "shared_mlp.input_linear")
}
DENSE_CONFIG = {"num_hidden_layers": 2, "hidden_size": 2, "intermediate_size": 2, "hidden_act": "silu"}
NONE_IS = "config.json: none of the layers is an MoE layer"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        layer_sources(load_config(folder))
    return str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "exaone4", "of_no_one", None, *SETTINGS])
@pytest.mark.parametrize("keys", [{}, {"num_local_experts": 0}, {"n_routed_experts": None}, {"num_experts": 1}], ids=str)
def test_a_dense_model(model_type: str | None, keys: Mapping[str, Any], tmp_path: Path) -> None:
    """Of an unknown family, and under the name of a known one, of which other keys are missing too."""
    folder = write_folder(tmp_path, {**DENSE_CONFIG, **keys, "model_type": model_type}, DENSE_TENSORS)
    assert NONE_IS in refusal(folder)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
        ("qwen3_moe", {"decoder_sparse_step": 3}),
        ("mellum", {"mlp_layer_types": ["dense", "dense"]}),
        ("llama4_text", {"moe_layers": []}),
        ("ernie4_5_moe", {"moe_layer_start_index": 2}),
        ("jamba", {"num_experts": 1}),
        ("lfm2_moe", {"num_dense_layers": 5}),
    ],
)
def test_a_model_all_of_whose_layers_are_dense(family: str, keys: Mapping[str, Any], tmp_path: Path) -> None:
    config = config_of(family)
    sizes = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts_per_tok", "moe_k")
    for size in sizes:
        assert NONE_IS in refusal(write_folder(tmp_path, {**config, **keys, size: None}, tensors_of(saved(family))))


def test_a_real_dense_model(tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(
        "qwen3", vocab_size=16, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert NONE_IS in refusal(tmp_path)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_git_lfs_pointer(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_folder(tmp_path, CONFIG, layer_tensors()) / name
    path.write_text(POINTER)
    assert main(["plan", str(tmp_path)]) == 2
    assert f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_a_git_lfs_pointer_in_place_of_an_index_or_a_shard(name: str, tmp_path: Path) -> None:
    first = {name: tensor for name, tensor in layer_tensors().items() if "experts" not in name}
    rest = {name: tensor for name, tensor in layer_tensors().items() if name not in first}
    path = write_folder(tmp_path, CONFIG, first, rest) / name
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the file itself: run `git lfs pull`") as caught:
        layer_sources(load_config(tmp_path))[0].router()
    assert str(path) in str(caught.value)


def test_a_file_that_only_mentions_git_lfs(tmp_path: Path) -> None:
    copytree(saved("mixtral"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"comment": POINTER}))
    assert len(layer_sources(load_config(tmp_path))) == tiny_model("mixtral").config.num_hidden_layers
