"""What a Forward costs here and in another checkout: two services at the same time, asked in turns, after a pause each time.

usage: python benchmarks/bench_against.py OTHER_CHECKOUT [--rounds N] [--intermediate N]
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

HERE = Path(__file__).parents[1]
HIDDEN = 1024
#: tokens of a request -> requests of a turn
TURNS = {1: 60, 64: 30, 1024: 6}
PAUSE_S = 0.3
SERVICE = """
[server]
port = 0
metrics_port = 0
[[layers]]
name = "layer"
hidden_size = {hidden}
intermediate_size = {intermediate}
num_experts = 8
activation = "swiglu"
seed = 0
gating.top_k = 2
[model]
dtype = "bfloat16"
[placement]
num_hosts = 2
"""
CLIENT = f"""
import sys, time, torch, moeserve
with moeserve.Client(sys.argv[1], timeout=60) as client:
    inputs = {{tokens: torch.randn(tokens, {HIDDEN}, dtype=torch.bfloat16) for tokens in {tuple(TURNS)}}}
    for hidden_states in list(inputs.values()) * 10:
        client.forward(hidden_states, layer=0)
    print(flush=True)
    for line in sys.stdin:
        tokens, count = map(int, line.split())
        took = []
        for _ in range(count):
            start = time.perf_counter()
            client.forward(inputs[tokens], layer=0)
            took.append(1000 * (time.perf_counter() - start))
        print(*took, flush=True)
"""


class Side:
    """The service of one checkout, and a client of the same."""

    def __init__(self, checkout: Path, folder: Path, intermediate: int) -> None:
        self.took_ms: dict[int, list[list[float]]] = {tokens: [] for tokens in TURNS}
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        config, log = folder / "service.toml", folder / f"{checkout.name}.log"
        config.write_text(SERVICE.format(hidden=HIDDEN, intermediate=intermediate))
        with log.open("w") as file:
            command = [sys.executable, "-m", "moeserve", "serve", str(config)]
            self.service = subprocess.Popen(command, env=environment, cwd=folder, stderr=file)
        while (ready := re.search(r"^ready (\S+)", log.read_text(), re.MULTILINE)) is None:
            if self.service.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        command = [sys.executable, "-c", CLIENT, ready[1]]
        self.client = subprocess.Popen(command, env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._line()

    def turn(self, tokens: int) -> None:
        assert self.client.stdin is not None
        self.client.stdin.write(f"{tokens} {TURNS[tokens]}\n")
        self.client.stdin.flush()
        self.took_ms[tokens].append([float(one) for one in self._line().split()])

    def _line(self) -> str:
        assert self.client.stdout is not None
        return self.client.stdout.readline()

    def stop(self) -> None:
        self.client.kill()
        self.client.wait()
        self.service.terminate()
        self.service.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--intermediate", type=int, default=4096)
    asked = parser.parse_args()
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, checkout in enumerate((asked.other.resolve(), HERE)):
                place = Path(folder, str(number))
                place.mkdir()
                sides.append(Side(checkout, place, asked.intermediate))
            for turn in range(asked.rounds * len(TURNS)):
                for side in sides if turn % 2 else reversed(sides):
                    time.sleep(PAUSE_S)
                    side.turn(list(TURNS)[turn % len(TURNS)])
        finally:
            for side in sides:
                side.stop()
    print("| tokens | other, p50 ms | here, p50 ms | here / other, median of the rounds |\n|--:|--:|--:|--:|")
    for tokens in TURNS:
        other, here = (side.took_ms[tokens] for side in sides)
        ratio = statistics.median(statistics.median(b) / statistics.median(a) for a, b in zip(other, here, strict=True))
        print(f"| {tokens} | {statistics.median(chain(*other)):.2f} | {statistics.median(chain(*here)):.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
