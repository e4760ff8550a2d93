"""A family from outside: a distribution on the path that says so in its entry points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeserve import CheckpointError, MoELayer
from moeserve.checkpoints.families import FAMILIES
from tests.support.checkpoints_on_disk import CONFIG, layer_tensors, write_folder
from tests.support.closeness import assert_close

MODULE = """
from moeserve.checkpoints import Family, Layout, Separate

def gating(config):
    if config.get("cold"):
        raise ValueError("cold is true; supported: false")
    return {"scoring_func": "sigmoid", "routed_scaling_factor": config["warmth"]}

names = Separate("experts.{expert}.a", "experts.{expert}.b", "experts.{expert}.c")
OURS = Family((Layout("blocks.{index}", names, router="choose"),), gating, intermediate_size=("width",), layer_name="blocks.{index}")
NOTHING = 5
"""
NAMES = {"gate.weight": "choose", "gate_proj.weight": "a", "up_proj.weight": "b", "down_proj.weight": "c"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Entry points as an installer writes them."""

    def entry_point(line: str) -> None:
        site = tmp_path / "site"
        info = site / "warm_moe-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: warm-moe\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[moeserve.families]\n{line}\n")
        (site / "warm_moe_for_test.py").write_text(MODULE)
        (site / "broken_for_test.py").write_text("1 / 0\n")
        monkeypatch.syspath_prepend(str(site))

    return entry_point


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {}
    for name, tensor in layer_tensors().items():
        stem = name.removeprefix("model.layers.0.mlp.")
        owner, old = (stem[: -len(end)], end) if (end := next((end for end in NAMES if stem.endswith(end)), "")) else (stem, "")
        tensors[f"blocks.0.{owner}{NAMES[old]}"] = tensor
    config = {**CONFIG, "model_type": "warm_moe", "width": CONFIG["intermediate_size"], "warmth": 1.5}
    return write_folder(tmp_path / "model", config, tensors)


def test_a_family_from_an_entry_point(install: Callable[[str], None], folder: Path) -> None:
    install("warm_moe = warm_moe_for_test:OURS")
    layer = MoELayer.from_checkpoint(folder)
    assert layer.spec.name == "blocks.0"
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    scores = torch.sigmoid(rows @ layer_tensors()["model.layers.0.mlp.gate.weight"].T)
    expected = torch.zeros(5, 8)
    for token, row in enumerate(rows):
        for expert in scores[token].topk(2).indices.tolist():
            gate, up, down = (layer_tensors()[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            expected[token] += 1.5 * scores[token, expert] * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    assert_close(layer(rows), expected)


def test_its_own_refusals_name_the_file(install: Callable[[str], None], folder: Path) -> None:
    install("warm_moe = warm_moe_for_test:OURS")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cold": True}))
    with pytest.raises(CheckpointError, match=r"config\.json: cold is true; supported: false"):
        MoELayer.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("other = warm_moe_for_test:OURS", "no known family has its keys and tensors; supported: {} and {}"),
        ("warm_moe = nowhere:OURS", "its entry point 'nowhere:OURS' cannot be imported"),
        ("warm_moe = warm_moe_for_test:THEIRS", "its entry point 'warm_moe_for_test:THEIRS' cannot be imported"),
        ("warm_moe = broken_for_test:OURS", "its entry point 'broken_for_test:OURS' cannot be imported: division by zero"),
        ("warm_moe = warm_moe_for_test:NOTHING", "its entry point 'warm_moe_for_test:NOTHING' is not a moeserve.checkpoints.Family"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(line: str, sentence: str, install: Callable[[str], None], folder: Path) -> None:
    install(line)
    with pytest.raises(CheckpointError) as caught:
        MoELayer.from_checkpoint(folder)
    supported = ", ".join(sorted({*FAMILIES, "other"}))
    assert sentence.replace("{} and {}", supported) in str(caught.value)
