"""Hosts stand where the nodes have room for them, outlive their drivers, and leave nodes that go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def test_a_fleet_on_three_nodes() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GRPC_ENABLE_FORK_SUPPORT": "0", "RAY_raylet_start_wait_time_s": "60"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.cluster.three_nodes"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    said = run.stdout
    assert re.search(r"refused: placement.num_hosts is 7 .* room for 6: .* does not have the labels pool=experts", said)
    assert re.search(r"refused: .* room for 2: .*Missing: 1 more node with the labels pool=experts .*strict_spread", said)
    assert re.search(r"refused: .* room for 0: .* does not have the labels pool=none", said)
    assert "all 6 packed on 1" in said
    assert "assignments ['wide', 'narrow', 'wide']" in said
    assert "GPUs [('narrow', '0'), ('wide', '0'), ('wide', '0'), ('wide', '1')]" in said, "half a GPU each, of one GPU"
    assert "adopted [] and answered over TCP" in said
    assert "given up with its node 1" in said
    assert "then [(0, 'wide'), (2, 'wide'), (8, 'wide')] [] [0, 2, 8]" in said
    assert "leaving: after 1 s there are host-0, host-2, host-8 still on node wide" in said
    assert "left: 0 set() {}" in said
