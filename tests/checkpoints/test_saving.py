"""What a folder of moeserve cannot hold is not saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from moeserve import MoELayer
from moeserve.errors import ConfigError
from tests.checkpoints.saved import saved


@pytest.mark.parametrize("family", ["deepseek_v2", "hy_v4"])
def test_a_shared_expert_of_another_kind(family: str, tmp_path: Path) -> None:
    """With biases that the others do not have, or another activation."""
    layer = MoELayer.from_checkpoint(saved(family), 0)
    with pytest.raises(ConfigError, match="its shared expert differs in activation or biases from the others"):
        layer.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_where_an_index_would_hide_it(tmp_path: Path) -> None:
    layer = MoELayer(hidden_size=8, num_experts=2, intermediate_size=8)
    layer.save(tmp_path)
    other = (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with safe_open(other, "pt") as file:
        names = dict.fromkeys(file.keys(), other.name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match=r"has model\.safetensors\.index\.json, which says that tensors are in other files"):
        layer.save(tmp_path)
