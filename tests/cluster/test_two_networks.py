"""Two nodes of a Ray cluster lose each other, and every expert has a copy on both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import descendants, signal_all

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def test_the_network_between_two_nodes_is_cut() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    command = [sys.executable, "-m", "tests.cluster.two_networks"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY, env=environment) as run:
        try:
            printed, errors = run.communicate(timeout=240)
        except BaseException:
            signal_all([*descendants(run.pid), run.pid], signal.SIGKILL)
            raise
    if printed.startswith("skipped: "):
        pytest.skip(printed.strip().removeprefix("skipped: "))
    assert run.returncode == 0, printed + errors[-3000:]
    assert "reached over unix" in printed and "reached over tcp" in printed
    assert "nobody failed" in printed
