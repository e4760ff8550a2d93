"""What a cluster cannot give is said at once, in a sentence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from torch import nn

from moeserve import BackgroundService, CheckpointError, Client, ConfigError, ExpertUnavailable, serve

pytestmark = pytest.mark.ray

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 16}
SERVER = {"port": 0, "metrics_port": 0}


def test_more_gpus_than_are_free(service: BackgroundService) -> None:
    config = {"layers": [LAYER], "placement": {"num_hosts": 9, "gpus_per_host": 1, "cpus_per_host": 0}, "server": SERVER}
    sentence = (
        r"num_hosts is 9 and each takes placement.gpus_per_host = 1, but there is room for 4: .* holds 4 \(4 of 12 .*Missing: 5 GPUs$"
    )
    with pytest.raises(ConfigError, match=sentence):
        serve(config)


def test_all_is_what_the_nodes_have_room_for(service: BackgroundService) -> None:
    placement = {"num_hosts": "all", "gpus_per_host": 2, "cpus_per_host": 0}
    with serve({"layers": [LAYER], "placement": placement, "server": SERVER}) as other, Client(other.target) as client:
        assert [len(host.cuda_visible_devices.split(",")) for host in client.stats().hosts] == [2, 2]


class Dying(nn.Linear):
    """An expert that takes its host with it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size)
        if b"ExpertHost" in Path("/proc/self/cmdline").read_bytes():
            os._exit(1)


def test_a_host_that_dies_again_and_again_is_not_waited_for(local_ray: None) -> None:
    layer = {"hidden_size": 16, "num_experts": 2, "expert": "tests.cluster.test_resources:Dying", "expert_args": {"hidden_size": 16}}
    with pytest.raises(ExpertUnavailable, match="host-0 died 3 times while it loaded its experts"):
        serve({"layers": [layer], "placement": {"num_hosts": 1}, "server": SERVER})


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
