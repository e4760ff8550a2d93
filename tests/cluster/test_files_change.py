"""The served folder gets other files, and a real host dies: nobody is answered by a mix, callers are told why, and a swap ends it."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeserve
from moeserve import CheckpointError, Client, ExpertUnavailable, MoELayer
from moeserve.errors import CheckpointChanged
from tests.support.checkpoints_on_disk import MLP
from tests.support.closeness import assert_close
from tests.support.ray_service import pid_of
from tests.support.seeded_folders import folder, replaced, tokens
from tests.support.waiting import until

pytestmark = pytest.mark.ray


def test_a_host_that_comes_back_to_other_files(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.cluster.looks.MISSED_S", math.inf)  # the other host may be slow to answer
    served, new = folder(tmp_path / "served", 0), folder(tmp_path / "new", 1)
    kept = Path(shutil.copytree(served, tmp_path / "kept"))
    old, changed = (MoELayer.from_checkpoint(path, dtype=torch.float32)(tokens(0)) for path in (served, new))
    config = {
        "model": {"checkpoint": served, "dtype": "float32"},
        "placement": {"num_hosts": 2, "cpus_per_host": 0.1},
        "server": {"port": 0, "metrics_port": 0},
    }
    with moeserve.serve(config) as service, Client(service.target) as client:
        assert_close(client.forward(tokens(0)).hidden_states, old)
        replaced(served, new)
        os.kill(pid_of(service, "host-0"), signal.SIGKILL)
        with pytest.raises(ExpertUnavailable, match=rf"the numbers in {served}/model\.safetensors are others; .*moeserve swap TARGET"):
            client.forward(tokens(0), timeout=60)
        assert not client.ready()
        status = service._service.controller.status
        until(lambda: "the numbers in" in status().shortage)
        shown = []
        for _ in range(25):  # longer than two looks of the controller
            shown.append([host.is_up for host in status().hosts])
            time.sleep(0.1)
        assert shown == [[False, True]] * 25, "it is down between two attempts to load, too"

        # Here host-0 takes the new weights and host-1 cannot: then neither has them, and with the old files host-0 is as it was.
        tensors = load_file(new / "model.safetensors")
        tensors[f"{MLP}.experts.3.down_proj.weight"][0, 0] = torch.nan
        save_file(tensors, new / "model.safetensors")
        with pytest.raises(CheckpointError, match="holds NaN or Inf"):
            service.swap("", new)
        replaced(served, kept)
        until(client.ready)
        assert_close(client.forward(tokens(0)).hidden_states, old)

        replaced(served, folder(tmp_path / "newer", 1))
        os.kill(pid_of(service, "host-1"), signal.SIGKILL)
        with pytest.raises(ExpertUnavailable, match="are others"):
            client.forward(tokens(0), timeout=60)
        with pytest.raises(CheckpointChanged):
            service.scale(3)
        assert service.swap("", served) == 2
        answer = client.forward(tokens(0), timeout=60)
        assert answer.model_revision == 2
        assert_close(answer.hidden_states, changed)
