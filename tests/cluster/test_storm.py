"""The command that moves experts in every way at once, for a few seconds on a real Ray. What it finds fails here, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_a_short_storm_finds_nothing() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bench_storm.py"), "--seconds", "12", "--calm", "6", "--seed", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing is wrong\n")
