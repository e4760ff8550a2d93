"""What config.json does not say and the files do not have is not there, whatever the default of transformers is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve import CheckpointError, MoELayer
from moeserve.checkpoints.claims import CLAIMS
from moeserve.checkpoints.families import family_of
from moeserve.checkpoints.family import no_shared_expert
from tests.checkpoints.saved import config_of, language_model, saved, second_layer, tensors_of
from tests.checkpoints.tiny_models import SETTINGS, some_tokens
from tests.support.checkpoints_on_disk import write_folder
from tests.support.closeness import assert_close

SHARED_KEYS = {key for claim in CLAIMS for key in claim.keys if "shared" in key or "share_expert" in key}
SHARED = (".shared_expert.", ".shared_experts.", ".shared_mlp.", ".shared_expert_gate.", ".share_expert.")
#: how the names of selection biases end; the last is DeepSeek-V4's
BIASES = ("_bias", ".ffn.gate.bias")
WITH_SHARED = [name for name in SETTINGS if family_of(name).shared_size is not no_shared_expert]
WITH_SELECTION_BIAS = [name for name in SETTINGS if any(layout.score_correction_bias for layout in family_of(name).layouts)]


def is_shared(name: str) -> bool:
    return any(part in name for part in SHARED)


def without(family: str, folder: Path, keys: set[str], *parts: str, **changes: Any) -> Path:
    """The saved model without keys, and without the tensors whose names have one of the parts."""
    text = config_of(family)
    section = language_model(text)
    for key in keys & set(section):
        del section[key]
    section.update(changes)
    tensors = {name: tensor for name, tensor in tensors_of(saved(family)).items() if not any(part in name for part in parts)}
    assert len(tensors) < len(tensors_of(saved(family))) or not parts
    return write_folder(folder, text, tensors)


# Cohere's would halve what the others answer.
@pytest.mark.parametrize("family", sorted(set(WITH_SHARED) - {"cohere2_moe"}))
def test_no_shared_expert(family: str, tmp_path: Path) -> None:
    folder = without(family, tmp_path, SHARED_KEYS, *SHARED)
    layer = MoELayer.from_checkpoint(folder, second_layer(family))
    assert layer.spec.shared_mixing is None
    # Its answer is that of the whole layer less what the shared expert adds: a layer whose shared expert is zero adds nothing.
    tensors = tensors_of(saved(family))
    zeroed = {
        name: torch.zeros_like(tensor) if is_shared(name) and re.search("down_proj|w2", name) else tensor
        for name, tensor in tensors.items()
    }
    text = config_of(family)
    expected = MoELayer.from_checkpoint(write_folder(tmp_path / "zeroed", text, zeroed), second_layer(family))(some_tokens(64))
    assert_close(layer(some_tokens(64)), expected)


@pytest.mark.parametrize("family", WITH_SHARED)
def test_a_shared_expert_that_config_json_says_is_there(family: str, tmp_path: Path) -> None:
    """Where there is a key for it."""
    said = SHARED_KEYS & set(language_model(SETTINGS[family]))
    said |= {theirs for theirs, ours in family_of(family).aliases.items() if ours in said}
    folder = without(family, tmp_path, set(), *SHARED)
    if not said:
        assert MoELayer.from_checkpoint(folder, second_layer(family)).spec.shared_mixing is None
        return
    with pytest.raises(CheckpointError, match=f"config.json: {'|'.join(said)} is .*, but a [a-z0-9_]+ model with the tensors"):
        MoELayer.from_checkpoint(folder, second_layer(family))


@pytest.mark.parametrize("family", WITH_SHARED)
def test_a_part_of_a_shared_expert_is_missing(family: str, tmp_path: Path) -> None:
    (up,) = {name for name in tensors_of(saved(family)) if ".1." in name and is_shared(name) and re.search(r"\.(up_proj|w3)\.weight", name)}
    with pytest.raises(CheckpointError, match=f"tensor {up} is missing"):
        MoELayer.from_checkpoint(without(family, tmp_path, set(), up), second_layer(family))


@pytest.mark.parametrize("family", WITH_SELECTION_BIAS)
def test_no_selection_bias(family: str, tmp_path: Path) -> None:
    """transformers fills in zeros."""
    layer = MoELayer.from_checkpoint(without(family, tmp_path, {"use_expert_bias"}, *BIASES), second_layer(family))
    assert layer.router.score_correction_bias is None
    tensors = tensors_of(saved(family))
    zeroed = {name: torch.zeros_like(tensor) if name.endswith(BIASES) else tensor for name, tensor in tensors.items()}
    text = config_of(family)
    expected = MoELayer.from_checkpoint(write_folder(tmp_path / "zeroed", text, zeroed), second_layer(family))
    assert torch.equal(layer(some_tokens(64)), expected(some_tokens(64)))


@pytest.mark.parametrize("key", ["use_routing_bias", "use_expert_bias", "moe_use_aux_free", "topk_method"])
@pytest.mark.parametrize("family", WITH_SELECTION_BIAS)
def test_a_selection_bias_that_config_json_says_is_there(family: str, key: str, tmp_path: Path) -> None:
    folder = without(family, tmp_path, {"use_expert_bias"}, *BIASES, **{key: "noaux_tc" if key == "topk_method" else True})
    with pytest.raises(CheckpointError, match=f"{key} is .*, but a [a-z0-9_]+ model with the tensors of this folder has"):
        MoELayer.from_checkpoint(folder, second_layer(family))


@pytest.mark.parametrize("parts", [(".experts.gate_up_proj_bias", ".experts.down_proj_bias"), (".router.bias",)])
def test_gpt_oss_without_biases(parts: tuple[str, ...], tmp_path: Path) -> None:
    """There is no key for them, and transformers fills in zeros."""
    layer = MoELayer.from_checkpoint(without("gpt_oss", tmp_path, set(), *parts), second_layer("gpt_oss"))
    tensors = tensors_of(saved("gpt_oss"))
    zeroed = {name: torch.zeros_like(tensor) if any(part in name for part in parts) else tensor for name, tensor in tensors.items()}
    text = config_of("gpt_oss")
    expected = MoELayer.from_checkpoint(write_folder(tmp_path / "zeroed", text, zeroed), second_layer("gpt_oss"))
    assert_close(layer(some_tokens(64)), expected(some_tokens(64)))


def test_half_of_the_biases_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.down_proj_bias is missing"):
        MoELayer.from_checkpoint(without("gpt_oss", tmp_path, set(), ".experts.down_proj_bias"))


@pytest.mark.parametrize("family", ["deepseek_v2", "ernie4_5_moe"])
def test_biases_of_the_shared_expert(family: str, tmp_path: Path) -> None:
    """The key is there and says so, is gone, or says something else."""
    key = family_of(family).shared_bias
    whole = MoELayer.from_checkpoint(saved(family), second_layer(family))(some_tokens(64))
    assert torch.equal(MoELayer.from_checkpoint(without(family, tmp_path, {key}), second_layer(family))(some_tokens(64)), whole)
    with pytest.raises(CheckpointError, match=f"{key} is false, but a [a-z0-9_]+ model with the tensors of this folder has true"):
        MoELayer.from_checkpoint(without(family, tmp_path, set(), **{key: False}), second_layer(family))


@pytest.mark.parametrize("family", [name for name in SETTINGS if SETTINGS[name].get("n_group")])
def test_no_groups(family: str, tmp_path: Path) -> None:
    groups = {"n_group", "num_expert_group", "topk_group"}
    changes = {"topk_method": "greedy"} if family == "deepseek_v2" else {}
    ungrouped = MoELayer.from_checkpoint(without(family, tmp_path / "a", groups, **changes), second_layer(family))
    assert ungrouped.spec.gating.num_expert_groups is None
    one = MoELayer.from_checkpoint(without(family, tmp_path / "b", groups, n_group=1, topk_group=1, **changes), second_layer(family))
    assert torch.equal(ungrouped(some_tokens(64)), one(some_tokens(64)))
    with pytest.raises(CheckpointError, match=r"config\.json: topk_group "):
        MoELayer.from_checkpoint(without(family, tmp_path / "c", groups, n_group=4), second_layer(family))
