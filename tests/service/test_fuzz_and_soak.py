"""The commands behind `make fuzz` and `make soak`, as short as they can be, side by side. What they find fails here, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {
    "bench_fuzz.py": ("--messages", "200", "--seed", "3", "--bound-ms", "60000"),
    "bench_soak.py": ("--minutes", "0.1", "--warm-up", "0.03", "--rests", "1", "--growth", "1"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of processes")
def test_short_runs_find_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    running = {
        name: subprocess.Popen(
            [sys.executable, str(REPOSITORY / "benchmarks" / name), "--cluster", "threads", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for name, flags in COMMANDS.items()
    }
    try:
        for name, process in running.items():
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, f"{name}:\n{said}"
            assert said.endswith("nothing is wrong\n")
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
