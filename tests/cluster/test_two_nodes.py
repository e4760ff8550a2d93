"""Hosts on another node are reached over encrypted TCP, and reach each other; a node is sent one message, or all of them one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def test_a_service_over_two_nodes() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    # Of its own, because other tests leave folders for a while; under /tmp, because paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="two", dir="/tmp") as folder:
        run = subprocess.run(
            [sys.executable, "-m", "tests.cluster.two_nodes"],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=REPOSITORY,
            env=environment | {"TMPDIR": folder},
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "reached over unix" in run.stdout and "reached over tcp" in run.stdout
    assert "nodes 2 hosts on the first 2" in run.stdout
    assert "hierarchical messages 2.0 retries 0.0" in run.stdout
    assert "ring messages 1.0 retries 0.0" in run.stdout, "hosts reach each other across nodes"
    assert "a host left and one came, all answers right True" in run.stdout, "the number of hosts follows the load"
    assert "left behind 0" in run.stdout
