"""A tensor of an MoE layer that nobody reads is an error, for plan as for serving; what training leaves behind is not."""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time

import pytest
import torch

from moeserve import CheckpointError, MoELayer, load_config
from moeserve.checkpoints import layer_sources
from moeserve.checkpoints.families import family_of
from moeserve.checkpoints.wrappers import everywhere
from moeserve.cli.app import main
from tests.checkpoints.saved import config_of, rewritten, saved, tensors_of
from tests.checkpoints.tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, SETTINGS
from tests.support.checkpoints_on_disk import CONFIG, MLP, layer_tensors, write_folder


def prefix_of(family: str) -> str:
    """Of the second layer, as it is stored; or of a part of it, where the rest of the decoder layer has the same prefix."""
    names = tensors_of(saved(family))
    layouts = [(layout.prefix.format(index=1), layout) for layout in everywhere(family_of(family).layouts)]
    prefix, layout = next((prefix, layout) for prefix, layout in layouts if f"{prefix}.{layout.router}" in names)
    return f"{prefix}.{layout.beside[0]}" if layout.beside else prefix


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize(
    "name",
    [
        "of_no_family.bias",
        "gate.bias",
        "shared_expert_of_ours.gate_proj.weight",
        "experts.0.gate_proj.lora_A",
        f"experts.{EXPERTS + 4}.gate_proj.weight",
        "experts.0.gate_proj.weight_scale",
    ],
)
def test_of_every_family(family: str, name: str, tmp_path: Path) -> None:
    """Known from the names alone: there is an index, and no file."""
    unread = f"{prefix_of(family)}.{name}"
    if unread in tensors_of(saved(family)):
        pytest.skip("it has such a tensor")
    weight_map = dict.fromkeys([*tensors_of(saved(family)), unread], "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config_of(family) | {"dtype": "float32"}))
    with pytest.raises(CheckpointError) as caught:
        layer_sources(load_config(tmp_path))
    # A scale where no weight is may also be that of a weight in few bits.
    told = (
        f"{tmp_path}: tensor {unread} belongs to an MoE layer, but",
        f"{tmp_path}: the index has {unread}, but config.json without quant",
    )
    assert str(caught.value).startswith(told)


UNREAD = {
    "a selection bias": {f"{MLP}.gate.e_score_correction_bias": (4,)},
    "a selection bias beside the other layout": {"model.layers.0.block_sparse_moe.e_score_correction_bias": (4,)},
    "a router bias": {f"{MLP}.gate.bias": (4,)},
    "an expert bias": {f"{MLP}.experts.0.up_proj.bias": (6,)},
    "one expert more": {f"{MLP}.experts.4.gate_proj.weight": (6, 8)},
    "a shared expert": {f"{MLP}.shared_expert.gate_proj.weight": (6, 8)},
    "a gate of a shared expert": {f"{MLP}.shared_expert_gate.weight": (1, 8)},
    "a scale": {f"{MLP}.experts.1.up_proj.weight_scale": (6, 1)},
    "a second layout": {f"{MLP}.experts.gate_up_proj": (4, 12, 8)},
}


@pytest.mark.parametrize("unread", UNREAD)
def test_what_a_mixtral_does_not_read(unread: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((name, shape),) = UNREAD[unread].items()
    folder = write_folder(tmp_path, CONFIG, layer_tensors() | {name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=f"tensor {name} belongs to an MoE layer"):
        MoELayer.from_checkpoint(folder)
    assert main(["plan", str(folder)]) == 2
    assert f"tensor {name} belongs to an MoE layer" in capsys.readouterr().err


def test_there_may_be_many(tmp_path: Path) -> None:
    config = CONFIG | {"num_local_experts": 3}
    write_folder(tmp_path, config, layer_tensors())
    with pytest.raises(CheckpointError, match=r"tensor .*\.experts\.3\.down_proj\.weight \(and 2 more\) belongs to an MoE layer"):
        MoELayer.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokens_per_expert", "gate.local_tokens_per_expert", "moe_statics.expert_usage", "experts.0.up_proj._extra_state"]
)
def test_what_training_leaves_behind_is_harmless(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CONFIG, layer_tensors() | {f"{MLP}.{name}": torch.ones(4)})
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    layer = MoELayer.from_checkpoint(folder)
    assert torch.equal(layer(rows), MoELayer.from_checkpoint(write_folder(tmp_path, CONFIG, layer_tensors()))(rows))


def test_tensors_beside_the_layer_are_nobodys_business(tmp_path: Path) -> None:
    beside = {
        f"{MLP}2.gate.bias": torch.ones(4),
        "model.layers.0.mlps.0.gate_proj.bias": torch.ones(4),
        "model.layers.1.mlp.x": torch.ones(1),
    }
    write_folder(tmp_path, CONFIG, layer_tensors() | beside)
    assert MoELayer.from_checkpoint(tmp_path).spec.num_experts == 4


def test_a_layer_that_config_json_says_is_dense_has_no_gate(tmp_path: Path) -> None:
    folder = rewritten(saved("deepseek_v3"), tmp_path, tensors_of(saved("deepseek_v3")), num_hidden_layers=2, first_k_dense_replace=1)
    assert [source.spec.name for source in layer_sources(load_config(folder))] == ["model.layers.1.mlp"]
    tensors = tensors_of(saved("mixtral"))
    folder = rewritten(saved("qwen3_moe"), tmp_path, as_qwen(tensors), decoder_sparse_step=1, mlp_only_layers=[0])
    with pytest.raises(
        CheckpointError, match=r"config.json says that layer 0 is dense, but there is a tensor model\.layers\.0\.mlp\.gate\.weight"
    ):
        layer_sources(load_config(folder))


def as_qwen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two MoE layers of a Mixtral by the names of a Qwen3."""
    for theirs, ours in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")):
        tensors = {name.replace(theirs, ours): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_a_plan_misses_what_is_not_in_the_index(part: str, expert: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"model.layers.1.mlp.experts.{expert}.{part}.weight"
    write_folder(tmp_path, config_of("qwen3_moe"), {}, {})
    names = [name for name in tensors_of(saved("qwen3_moe")) if name != missing]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    assert main(["plan", str(tmp_path)]) == 2
    assert f"tensor {missing} is missing" in capsys.readouterr().err


def test_sixty_layers_of_256_experts_are_checked_in_no_time(tmp_path: Path) -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight{scale}"
        for layer in range(60)
        for expert in range(256)
        for part in ("gate", "up", "down")
        for scale in ("", "_scale_inv")
    ]
    names += [f"model.layers.{layer}.mlp.gate.weight" for layer in range(60)]
    config = {
        **CONFIG,
        "num_hidden_layers": 60,
        "num_local_experts": 256,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight_map = dict.fromkeys(names, "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    started = process_time()
    assert len(layer_sources(load_config(tmp_path))) == 60
    assert process_time() - started < 5, "0.3 s of a processor; by the square of the names it would be minutes"
