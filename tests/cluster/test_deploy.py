"""A service is deployed on a real cluster, changed while callers ask, loses its controller and a node, gains one, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


@pytest.mark.timeout(600)
def test_from_deployment_to_shutdown(tmp_path: Path, tiny_moe: Path) -> None:
    script = [sys.executable, "-m", "tests.cluster.deployed", str(tmp_path), str(tiny_moe)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GRPC_ENABLE_FORK_SUPPORT": "0", "RAY_raylet_start_wait_time_s": "60"}
    run = subprocess.run(script, capture_output=True, text=True, timeout=400, env=environment, check=False, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    seen = run.stdout
    assert "hosts on 2 nodes" in seen, "spread, and none on the head"
    assert "once more the same: True" in seen
    assert "another: another service, or this one with another configuration, is deployed in ray.namespace 'moeserve'" in seen
    assert "five: placement.num_hosts is 5 and each takes placement.cpus_per_host = 1, but there is room for 4" in seen
    assert "four hosts: epoch 2" in seen
    assert "after the controller's death: epoch 2 the same hosts: True frontends: 1" in seen
    assert "after an interrupted change: epoch higher" in seen
    assert "after a node's death: placement.num_hosts is 4 and each takes placement.cpus_per_host = 1, but there is room for 2" in seen
    assert "start: the controller was started again, done, nothing moved" in seen
    assert "hosts: node THE-ONE is gone, done, moved" in seen
    assert "hosts: nodes have room for more hosts, done, moved" in seen
    assert "hosts: node THE-OTHER is leaving, done, moved" in seen
    assert "followed to its end: 0\n" in seen
    assert "status: all wanted, 3 hosts, True" in seen
    assert "answered enough" in seen, "and every answer was right"
    assert "shutdown 0" in seen
    assert "told to go: stopped; the service keeps running 0" in seen
    assert "deployed again: epoch 1" in seen
