"""The network between a frontend and a host is cut, one-way, lossy, or slow: real packets between two networks of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_a_service_whose_network_is_disturbed() -> None:
    """In a process of its own, which moves to another network."""
    command = [sys.executable, "-m", "tests.frontend.two_networks"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPOSITORY, check=False)
    if run.stdout.startswith("skipped: "):
        pytest.skip(run.stdout.strip().removeprefix("skipped: "))
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert "answered" in run.stdout.splitlines()[-1]
