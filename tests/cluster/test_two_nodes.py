"""Hosts on another node are reached over encrypted TCP, each node by one message; what is for its other hosts stays on the node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_a_service_over_two_nodes() -> None:
    script = Path(__file__).with_name("two_nodes.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "reached over unix" in run.stdout and "reached over tcp" in run.stdout
    assert "nodes 2 hosts on the first 2" in run.stdout
    assert "messages 2.0" in run.stdout and "retries 0.0" in run.stdout
    assert "left behind 0" in run.stdout
