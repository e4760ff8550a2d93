"""Tokens/s of vLLM with its own experts and with those of a service: python benchmarks/bench_vllm.py --vllm PYTHON.

PYTHON has vLLM and moeserve, as that of `make test-vllm`. Three engines, each a process with one thread for tensors, generate greedily with
examples/tiny-moe in float32, without torch.compile, and take turns; two of them ask one `moeserve serve`. Medians of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from running import served

HERE = Path(__file__).parent
TINY = HERE.parent / "examples" / "tiny-moe"
SEQUENCES = (1, 8)
NEW = 48
CALLS_OF_A_STEP = 4
CONFIG = """
[model]
checkpoint = "{checkpoint}"
dtype = "float32"
[placement]
num_hosts = 2
[server]
port = 0
metrics_port = 0
"""
#: one process, one thread that is bound to no core, no downloads
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """`generate` returns seconds and tokens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM exited with {self._process.wait()}")
        return json.loads(line)

    def generate(self, sequences: int) -> tuple[float, list[list[int]]]:
        assert self._process.stdin is not None
        print(json.dumps([sequences, NEW]), file=self._process.stdin, flush=True)
        seconds, tokens = self.read()
        return seconds, tokens


@contextmanager
def engine(python: str, settings: dict[str, Any] | None, log: Path) -> Iterator[Engine]:
    """One that is ready, with its own experts if there are no settings of moeserve."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOESERVE_", "OMP_"))}
    command = [python, str(HERE / "vllm_engine.py"), json.dumps({"model": str(TINY), "moeserve": settings})]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**ours, **ENVIRONMENT}
        ) as process,
    ):
        try:
            started = Engine(process)
            started.read()
            yield started
        finally:
            process.kill()


def row(engines: dict[str, Engine], sequences: int, rounds: int) -> str:
    """Of the table; the round before the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds + 1):
        found = {name: each.generate(sequences) for name, each in engines.items()}
        assert all(tokens == found["own"][1] for _, tokens in found.values()), "other tokens"
        for name, (took_s, _) in found.items():
            seconds[name] += [took_s] if round_ else []
    middle = {name: median(times) for name, times in seconds.items()}
    rates = " | ".join(f"{sequences * NEW / each:.1f}" for each in middle.values())
    shares = " | ".join(f"**{middle['own'] / middle[name]:.2f}**" for name in ("embedded", "grpc"))
    calls = " | ".join(f"{1000 * (middle[name] - middle['own']) / NEW / CALLS_OF_A_STEP:.2f}" for name in ("embedded", "grpc"))
    return f"| {sequences} | {rates} | {shares} | {calls} |"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="a Python with vLLM and moeserve")
    parser.add_argument("--cluster", choices=("ray", "threads"), default="ray")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "service.toml").write_text(CONFIG.format(checkpoint=TINY))
        target, _, _ = stack.enter_context(served(folder / "service.toml", arguments.cluster))
        settings = {
            "own": None,
            "embedded": {"target": target, "embedded": True},
            "grpc": {"target": target, "embedded": False},
        }
        engines = {side: stack.enter_context(engine(arguments.vllm, each, folder / f"{side}.log")) for side, each in settings.items()}
        print("| sequences | own tokens/s | embedded | gRPC | embedded / own | gRPC / own | embedded, ms more for a call | gRPC |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|")
        for sequences in SEQUENCES:
            print(row(engines, sequences, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
