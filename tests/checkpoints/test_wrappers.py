"""A language model inside another: any family, under any of the usual tables and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeserve import CheckpointError, MoELayer
from moeserve.checkpoints.wrappers import SECTIONS, language_model, model_types, places
from tests.checkpoints.saved import saved, tensors_of
from tests.checkpoints.tiny_models import some_tokens

PLACES = ("model.language_model.", "language_model.model.", "language_model.", "thinker.model.", "llm.model.", "model.llm.", "")


def nested(section: str, table: dict[str, Any]) -> dict[str, Any]:
    for key in reversed(section.split(".")):
        table = {key: table}
    return table


def wrapped(family: str, folder: Path, section: str, place: str, **whole: object) -> Path:
    """The saved model of `family` as the language model of another."""
    config = json.loads((saved(family) / "config.json").read_text())
    table = nested(section, {key: value for key, value in config.items() if key not in ("architectures", "dtype")})
    (folder / "config.json").write_text(json.dumps({"model_type": "wrapper", "dtype": "float32", **table, **whole}))
    tensors = {f"{place}{name.removeprefix('model.')}": tensor.contiguous() for name, tensor in tensors_of(saved(family)).items()}
    # An encoder of the same build must not be mistaken for the language model.
    save_file({**tensors, "visual.layers.1.mlp.gate.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "lfm2_moe"])
def test_under_every_name(family: str, place: str, tmp_path: Path) -> None:
    hidden_states = some_tokens(7)
    found = MoELayer.from_checkpoint(wrapped(family, tmp_path, "text_config", place))
    bare = MoELayer.from_checkpoint(saved(family), found.spec.name)
    assert torch.equal(found(hidden_states), bare(hidden_states))


@pytest.mark.parametrize("section", SECTIONS)
def test_in_every_table(section: str, tmp_path: Path) -> None:
    found = MoELayer.from_checkpoint(wrapped("deepseek_v3", tmp_path, section, "model.language_model."))
    assert torch.equal(found(some_tokens(7)), MoELayer.from_checkpoint(saved("deepseek_v3"))(some_tokens(7)))


def test_a_language_model_without_a_type_has_that_of_its_wrapper(tmp_path: Path) -> None:
    folder = wrapped("deepseek_v3", tmp_path, "text_config", "language_model.model.", model_type="deepseek_v3")
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(MoELayer.from_checkpoint(folder)(some_tokens(7)), MoELayer.from_checkpoint(saved("deepseek_v3"))(some_tokens(7)))


def test_what_is_wrapped_must_be_known(tmp_path: Path) -> None:
    folder = wrapped("deepseek_v3", tmp_path, "text_config", "language_model.model.")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model_type is llama \(in wrapper\), which is not known; .* are those of deepseek_v3"):
        MoELayer.from_checkpoint(folder)


@given(st.sampled_from(SECTIONS), st.dictionaries(st.text(), st.integers()), st.one_of(st.none(), st.text()))
def test_the_table_of_the_language_model(section: str, table: dict[str, Any], model_type: str | None) -> None:
    own = table | {"hidden_size": 8} | ({} if model_type is None else {"model_type": model_type})
    config = {"model_type": "wrapper", "vision_config": {"model_type": "vit"}, **nested(section, own)}
    assert language_model(config) == own
    assert model_types(config) == list(dict.fromkeys([own["model_type"], "wrapper"] if "model_type" in own else ["wrapper"]))
    for beside in (None, {}, {"quantization_config": {}}, "text"):
        assert language_model(own | {"text_config": beside}) == own | {"text_config": beside}


def test_the_bare_name_comes_first() -> None:
    assert places("model.layers.{index}.mlp")[0] == "model.layers.{index}.mlp"
    assert "language_model.transformer.blocks.{index}.ffn" in places("transformer.blocks.{index}.ffn")
