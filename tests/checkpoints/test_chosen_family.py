"""`model.family`, and what is said about a model type that nobody knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moeserve import CheckpointError, ConfigError, MoELayer, load_config
from moeserve.checkpoints import layer_sources
from moeserve.cli.verbs import app
from tests.checkpoints.saved import rewritten, saved, tensors_of
from tests.checkpoints.tiny_models import some_tokens


def renamed(family: str, folder: Path, **config: Any) -> Path:
    """A model of `family` under a type of its own."""
    config = {"model_type": "my_llm", "architectures": ["MyLlmForCausalLM"], **config}
    return rewritten(saved(family), folder, tensors_of(saved(family)), **config)


@pytest.mark.parametrize(
    ("family", "alike"),
    [
        ("deepseek_v3", "deepseek_v3"),
        ("glm4_moe", "deepseek_v3"),
        ("qwen2_moe", "qwen2_moe"),
        ("mixtral", "mixtral"),
        ("gpt_oss", "gpt_oss"),
        ("minimax_m2", "minimax_m2"),
        ("llama4", "llama4"),
        ("granitemoe", "granitemoe"),
        ("dbrx", "dbrx"),
    ],
)
def test_an_unknown_type_is_told_what_it_looks_like(family: str, alike: str, tmp_path: Path) -> None:
    folder = renamed(family, tmp_path)
    if family == "llama4":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["model_type"] = "my_llm_text"
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        MoELayer.from_checkpoint(folder)
    assert "my_llm" in str(caught.value)
    first = str(caught.value).split(" are those of ")[1].split(": --family ")
    assert first[0].split(" or ")[0] == alike
    assert first[1].split(" ")[0] == first[0].split(" or ")[0]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "lfm2_moe"])
def test_it_is_served_as_that(family: str, tmp_path: Path) -> None:
    told, bare = MoELayer.from_checkpoint(renamed(family, tmp_path), family=family), MoELayer.from_checkpoint(saved(family))
    assert torch.equal(told(some_tokens(7)), bare(some_tokens(7)))
    assert told.spec == bare.spec


def test_by_flag_and_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = renamed("deepseek_v3", tmp_path)
    refused = CliRunner().invoke(app, ["plan", str(folder)])
    assert refused.exit_code != 0
    assert CliRunner().invoke(app, ["plan", str(folder), "--family", "deepseek_v3"]).exit_code == 0
    monkeypatch.setenv("MOESERVE_FAMILY", "deepseek_v3")
    assert CliRunner().invoke(app, ["plan", str(folder)]).exit_code == 0


def test_before_anything_is_downloaded(tmp_path: Path) -> None:
    folder = renamed("deepseek_v3", tmp_path, dtype="bfloat16")
    names = dict.fromkeys(tensors_of(folder), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="are those of deepseek_v3"):
        layer_sources(load_config(folder))


def test_what_looks_like_nothing(tmp_path: Path) -> None:
    tensors = {name.replace("gate_proj", "fan_out"): tensor for name, tensor in tensors_of(saved("deepseek_v3")).items()}
    folder = rewritten(saved("deepseek_v3"), tmp_path, tensors, model_type="my_llm", architectures=[])
    with pytest.raises(
        CheckpointError, match=r"model_type is my_llm, which is not known, and no known family has its keys and tensors; sup"
    ):
        layer_sources(load_config(folder))


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("gpt_oss", r"config\.json: num_local_experts must be .*, but is missing; it was read as gpt_oss, because model\.family says so"),
        ("qwen3_moe", r"; it was read as qwen3_moe, because model\.family says so"),
        ("dbrx", r"config\.json: ffn_config\.ffn_hidden_size must be .*; it was read as dbrx, because model\.family says so"),
    ],
)
def test_a_family_that_does_not_fit(family: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        MoELayer.from_checkpoint(renamed("deepseek_v3", tmp_path), family=family)


def test_a_family_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.family is 'my_llm'; supported: afmoe, "):
        MoELayer.from_checkpoint(renamed("deepseek_v3", tmp_path), family="my_llm")


def test_what_has_no_family(tmp_path: Path) -> None:
    MoELayer(hidden_size=8, intermediate_size=8, num_experts=2).save(tmp_path / "ours", "layer")
    with pytest.raises(ConfigError, match=r"model\.family is 'mixtral', but .*ours is no checkpoint of Hugging Face; allowed: unset"):
        MoELayer.from_checkpoint(tmp_path / "ours", family="mixtral")
    layers = [{"hidden_size": 8, "intermediate_size": 8, "num_experts": 2}]
    with pytest.raises(ConfigError, match=r"model\.family needs model\.checkpoint"):
        load_config({"model": {"family": "mixtral"}, "layers": layers})
