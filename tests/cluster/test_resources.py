"""What a cluster cannot give is said at once, in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moeserve import CheckpointError, ConfigError, serve

pytestmark = pytest.mark.ray

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 16}
SERVER = {"port": 0, "metrics_port": 0}


def test_more_gpus_than_exist(local_ray: None) -> None:
    config = {"layers": [LAYER], "placement": {"num_hosts": 9, "gpus_per_host": 1, "cpus_per_host": 0}, "server": SERVER}
    sentence = r"num_hosts is 9 and each takes placement.gpus_per_host = 1, but there is room for 8: .* holds 8 .*Missing: 1 GPU$"
    with pytest.raises(ConfigError, match=sentence):
        serve(config)


def test_a_host_that_cannot_read_its_weights_ends_the_start(local_ray: None, tiny_moe: Path, tmp_path: Path) -> None:
    """The header is whole, so the frontend starts; a tensor of an expert is not what config.json says, so its host refuses."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts" in name)
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        serve({"model": {"checkpoint": broken}, "placement": {"num_hosts": 2, "cpus_per_host": 0}, "server": SERVER})
