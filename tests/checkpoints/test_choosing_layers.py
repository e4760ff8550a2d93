"""Which layers of a checkpoint are served, and with what changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import CheckpointError, ConfigError, GatingConfig, InvalidRequest, MoELayer, UnknownLayer, load_config
from moeserve.checkpoints import layer_sources
from tests.support.checkpoints_on_disk import CONFIG, layer_tensors, write_folder


def names(tiny_moe: Path, **model: Any) -> list[str]:
    return [source.spec.name for source in layer_sources(load_config({"model": {"checkpoint": tiny_moe, **model}}))]


def gatings(tiny_moe: Path, *layers: dict[str, Any]) -> list[GatingConfig]:
    config = load_config({"model": {"checkpoint": tiny_moe}, "layers": list(layers)})
    return [source.spec.gating for source in layer_sources(config)]


def test_layers_are_chosen_by_position_or_name_and_stay_in_model_order(tiny_moe: Path) -> None:
    every = [f"model.layers.{index}.mlp" for index in range(4)]
    assert names(tiny_moe) == every
    assert names(tiny_moe, layers=[2, 0, "model.layers.2.mlp"]) == [every[0], every[2]]


@pytest.mark.parametrize("layer", [4, -1, "model.layers.4.mlp"])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(tiny_moe: Path, layer: int | str) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers: the checkpoint has no MoE layer .*it has 0\.\.3: model\.layers\.0\.mlp"):
        names(tiny_moe, layers=[layer])
    with pytest.raises(UnknownLayer, match=r"has no MoE layer .*; it has 0\.\.3"):
        MoELayer.from_checkpoint(tiny_moe, layer)


def test_true_is_no_position(tiny_moe: Path) -> None:
    with pytest.raises(InvalidRequest, match="layer must be a position or a name, got bool"):
        MoELayer.from_checkpoint(tiny_moe, True)


def test_what_is_written_down_wins_over_the_checkpoint(tiny_moe: Path) -> None:
    stored = GatingConfig(top_k=2, renormalize="pre_drop")
    assert gatings(tiny_moe) == [stored] * 4
    every, one = {"gating": {"capacity_factor": 1.5}}, {"name": "model.layers.1.mlp", "gating": {"top_k": 1, "renormalize": "none"}}
    changed = gatings(tiny_moe, every, one)
    assert changed[0] == changed[2] == changed[3] == GatingConfig(top_k=2, renormalize="pre_drop", capacity_factor=1.5)
    assert changed[1] == GatingConfig(top_k=1, renormalize="none", capacity_factor=1.5)


def test_gating_given_to_a_layer_changes_only_what_it_names(tiny_moe: Path) -> None:
    layer = MoELayer.from_checkpoint(tiny_moe, gating=GatingConfig(capacity_factor=1.0))
    assert layer.spec.gating == GatingConfig(top_k=2, renormalize="pre_drop", capacity_factor=1.0)


def test_changes_a_checkpoint_cannot_follow_are_refused(tiny_moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers\.hidden_size cannot be set for model\.layers\.0\.mlp: the checkpoint decides it"):
        gatings(tiny_moe, {"hidden_size": 64})
    with pytest.raises(ConfigError, match=r"layers\.name 'model\.layers\.9\.mlp' is not a served layer; served: model\.layers\.0\.mlp"):
        gatings(tiny_moe, {"name": "model.layers.9.mlp"})


@pytest.mark.parametrize("top_k", [9, 100])
def test_more_choices_than_experts_are_refused(tiny_moe: Path, top_k: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer model\.layers\.0\.mlp: gating\.top_k is {top_k}, but it has 8 experts"):
        MoELayer.from_checkpoint(tiny_moe, gating=GatingConfig(top_k=top_k))


def test_more_choices_than_experts_in_the_checkpoint_itself_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {**CONFIG, "num_experts_per_tok": 5}, layer_tensors())
    with pytest.raises(ConfigError, match=r"config\.json: num_experts_per_tok must be at most 4, the number of experts, but is 5"):
        MoELayer.from_checkpoint(tmp_path)


def test_unsupported_dtype_is_refused(tiny_moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype torch\.float64 is not supported; allowed: torch\.float32"):
        MoELayer.from_checkpoint(tiny_moe, dtype=torch.float64)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint folder {tmp_path}/none does not exist"):
        MoELayer.from_checkpoint(tmp_path / "none")
