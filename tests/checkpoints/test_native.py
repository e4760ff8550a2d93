"""moeserve's own folder: only what is asked for is read, and what is wrong with it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import MoELayer
from moeserve.checkpoints import layer_sources
from moeserve.compat import save_layers
from moeserve.config import load_config
from moeserve.errors import CheckpointError, ConfigError
from moeserve.experts import ExpertShard
from tests.support.closeness import assert_close

HIDDEN, EXPERTS = 8, 4
LINEAR = {"expert": "torch.nn:Linear", "expert_args": {"in_features": HIDDEN, "out_features": HIDDEN}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = {"intermediate_size": 5, "mixing": "residual"}
    MoELayer(hidden_size=HIDDEN, num_experts=EXPERTS, intermediate_size=6, bias=True, shared_expert=shared).save(tmp_path / "saved")
    return tmp_path / "saved"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_layer(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["layers"][0] |= keys
    (folder / "config.json").write_text(json.dumps(config))


def source(folder: Path, **model: Any) -> Any:
    return layer_sources(load_config({"model": {"checkpoint": folder, **model}}))[0]


def load(folder: Path) -> MoELayer:
    return MoELayer.from_checkpoint(folder)


def test_only_the_experts_asked_for_are_read(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["layers.0.experts.3.down_proj"].fill_(torch.nan))
    layer = source(folder)
    assert len(layer.experts([ExpertShard(0), ExpertShard(2)])) == 2
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.3\.down_proj holds NaN or Inf"):
        layer.experts([ExpertShard(3)])


def test_shards_add_up_to_the_expert(folder: Path) -> None:
    layer, rows = source(folder), torch.randn(5, HIDDEN)
    whole = layer.experts([ExpertShard(1)])[0]
    parts = layer.experts([ExpertShard(1, shard, 4) for shard in range(4)])
    assert_close(torch.stack([part(rows) for part in parts]).sum(dim=0), whole(rows))
    assert [part.nbytes for part in parts] == [layer.nbytes(ExpertShard(1, shard, 4)) for shard in range(4)]


def test_gating_can_be_changed_and_dtype_cast(folder: Path) -> None:
    layer = layer_sources(load_config({"model": {"checkpoint": folder, "dtype": "bfloat16"}, "layers": [{"gating": {"top_k": 1}}]}))[0]
    assert (layer.spec.gating.top_k, layer.spec.dtype) == (1, "bfloat16")
    assert layer.shared_expert() is not None
    with pytest.raises(ConfigError, match=r"layers\.num_experts cannot be set"):
        layer_sources(load_config({"model": {"checkpoint": folder}, "layers": [{"num_experts": 2}]}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("layers.0.gate.weight"), r"tensor layers\.0\.gate\.weight is missing"),
        (lambda tensors: tensors.pop("layers.0.mixer.weight"), r"tensor layers\.0\.mixer\.weight is missing"),
        (lambda tensors: tensors.pop("layers.0.experts.2.down_bias"), r"tensor layers\.0\.experts\.2\.down_bias is missing"),
        (
            lambda tensors: tensors.update({"layers.0.shared_expert.down_proj": torch.zeros(HIDDEN, 4)}),
            r"layers\.0\.shared_expert\.down_proj has shape \[8, 4\], config\.json says \[8, 5\]",
        ),
        (
            lambda tensors: tensors.update({"layers.0.gate.score_correction_bias": torch.zeros(3)}),
            r"score_correction_bias has shape \[3\], config\.json says \[4\]",
        ),
        (lambda tensors: tensors["layers.0.gate.weight"].fill_(torch.inf), r"layers\.0\.gate\.weight holds NaN or Inf"),
    ],
)
def test_tensors_that_are_wrong(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], sentence: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=sentence):
        load(folder)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"hidden_size": None}, r"layers\.0\.hidden_size is missing"),
        ({"name": None}, r"layers\.0\.name is missing"),
        ({"experts": 4}, r"layers\.0\.experts: Extra inputs"),
        ({"num_experts": 0}, r"layers\.0\.num_experts: Input should be greater"),
        ({"gating": {"top_k": 9}}, "gating.top_k is 9, but it has 4 experts"),
        ({"bias": False}, r"tensor layers\.0\.experts\.0\.down_bias belongs to an MoE layer, but config\.json describes one that does not"),
        ({"shared_expert": None}, r"tensor layers\.0\.mixer\.\w+ belongs to"),
        ({**LINEAR, "intermediate_size": None}, r"tensor layers\.0\.experts\.0\.weight is missing"),
        ({**LINEAR, "intermediate_size": None, "expert_args": {"in_features": 8}}, "cannot be made with"),
    ],
)
def test_descriptions_that_are_wrong(folder: Path, keys: dict[str, Any], sentence: str) -> None:
    change_layer(folder, **keys)
    with pytest.raises(ConfigError, match=sentence):
        load(folder)


@pytest.mark.parametrize("layers", [None, [], {}, [3]])
def test_a_config_without_layers(folder: Path, layers: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "moeserve", "layers": layers}))
    with pytest.raises(CheckpointError, match="layers"):
        load(folder)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose import leaves a trace, and in which a function of another package can be found."""
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "__init__.py").write_text(
        f"from os import system\nfrom torch.nn import Linear as Expert\nopen({str(tmp_path / 'trace')!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "keys",
    [
        {"expert": "stranger:Expert", "intermediate_size": None},
        {"shared_expert": {"expert": "stranger:Expert"}},
        {"gating": {"routing": "stranger:Expert"}},
    ],
)
def test_nothing_is_imported_that_is_not_trusted(folder: Path, package: Path, keys: dict[str, Any]) -> None:
    change_layer(folder, **keys)
    with pytest.raises(ConfigError, match=r"names 'stranger:Expert' as .* allow it with model\.trusted_modules = \['stranger'\]"):
        source(folder, trusted_modules=["strange", "torch", "stranger.inner"])
    assert not (package / "trace").exists()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("stranger:system", "not a class of nn.Module"),
        ("torch.nn:Parameter", "not a module of torch.nn"),
        ("torch.nn.modules.module:torch", "not a class of nn.Module"),
        ("torch.nn.utils.parametrize:Linear", "trusted_modules"),
        ("os:system", "trusted_modules"),
    ],
)
def test_only_classes_of_modules_are_made(folder: Path, package: Path, path: str, sentence: str) -> None:
    change_layer(folder, expert=path, expert_args={"command": f"touch {package / 'ran'}"}, intermediate_size=None)
    with pytest.raises(ConfigError, match=sentence):
        source(folder, trusted_modules=["stranger"])
    assert not (package / "ran").exists()


def test_what_is_trusted_is_made(folder: Path, package: Path) -> None:
    change_layer(folder, **LINEAR, intermediate_size=None)
    change_tensors(folder, lambda tensors: tensors.update({f"layers.0.experts.{e}.weight": torch.eye(HIDDEN) for e in range(EXPERTS)}))
    change_tensors(folder, lambda tensors: tensors.update({f"layers.0.experts.{e}.bias": torch.zeros(HIDDEN) for e in range(EXPERTS)}))
    change_layer(folder, expert="stranger:Expert")
    layer, rows = source(folder, trusted_modules=["stranger"]), torch.randn(3, HIDDEN)
    assert torch.equal(layer.experts([ExpertShard(2)])[0](rows), rows)


def test_a_layer_whose_name_begins_as_that_of_another(tmp_path: Path) -> None:
    layers = {name: MoELayer(hidden_size=HIDDEN, num_experts=2, intermediate_size=6, seed=len(name)) for name in ("block", "block.moe")}
    save_layers(tmp_path, layers)
    rows = torch.randn(3, HIDDEN)
    for name, layer in layers.items():
        assert_close(MoELayer.from_checkpoint(tmp_path, name)(rows), layer(rows))
