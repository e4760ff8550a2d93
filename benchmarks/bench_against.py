"""What a Forward costs here and in another checkout: two services at the same time, asked in turns, after a pause each time.

In milliseconds of a call, and in CPU time of all processes of a side, which says more where others use the machine too. Where several calls
are in progress, milliseconds are those of the turn, divided by its calls.

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
from contextlib import suppress
from itertools import chain
from pathlib import Path

HERE = Path(__file__).parents[1]
HIDDEN = 1024
#: tokens, requests in progress, milliseconds before each
Turn = tuple[int, int, int]
#: -> requests of a turn
TURNS: dict[Turn, int] = {
    (1, 1, 0): 60,
    (1, 1, 1): 60,
    (1, 1, 10): 30,
    (64, 1, 0): 30,
    (1024, 1, 0): 6,
    (1, 16, 0): 160,
    (64, 3, 0): 45,
    (64, 8, 0): 80,
    (512, 4, 0): 24,
}
TOKENS = tuple({tokens: None for tokens, _, _ in TURNS})
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
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as pool, moeserve.Client(sys.argv[1], timeout=60) as client:
    inputs = {{tokens: torch.randn(tokens, {HIDDEN}, dtype=torch.bfloat16) for tokens in {TOKENS}}}
    for hidden_states in list(inputs.values()) * 10:
        client.forward(hidden_states, layer=0)
    print(flush=True)
    for line in sys.stdin:
        tokens, at_once, pause_ms, count = map(int, line.split())
        took = []
        def ask(number):
            if pause_ms:
                time.sleep(pause_ms / 1000)
            start = time.perf_counter()
            client.forward(inputs[tokens], layer=0)
            took.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        if at_once == 1:
            for number in range(count):
                ask(number)
        else:
            for asking in [pool.submit(lambda: [ask(number) for number in range(count // at_once)]) for _ in range(at_once)]:
                asking.result()
            took = [1000 * (time.perf_counter() - start) / count]
        print(*took, flush=True)
"""


class Side:
    """The service of one checkout, and a client of the same."""

    def __init__(self, checkout: Path, folder: Path, intermediate: int) -> None:
        self.took_ms: dict[Turn, list[list[float]]] = {turn: [] for turn in TURNS}
        self.cpu_ms: dict[Turn, list[float]] = {turn: [] for turn in TURNS}
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

    def turn(self, turn: Turn) -> None:
        assert self.client.stdin is not None
        before_ms = self._cpu_ms()
        self.client.stdin.write(f"{' '.join(map(str, turn))} {TURNS[turn]}\n")
        self.client.stdin.flush()
        self.took_ms[turn].append([float(one) for one in self._line().split()])
        self.cpu_ms[turn].append((self._cpu_ms() - before_ms) / TURNS[turn])

    def _cpu_ms(self) -> float:
        """Of the client, the service and all that it has started."""
        children: dict[int, list[int]] = {}
        used: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid, after_name = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
                children.setdefault(int(after_name[1]), []).append(pid)
                used[pid] = int(after_name[11]) + int(after_name[12])
        found = [self.client.pid, self.service.pid]
        for pid in found:
            found += children.get(pid, [])
        return 1000 / os.sysconf("SC_CLK_TCK") * sum(used.get(pid, 0) for pid in found)

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
            for number, turn in enumerate(list(TURNS) * asked.rounds):
                for side in sides if number % 2 else reversed(sides):
                    time.sleep(PAUSE_S)
                    side.turn(turn)
        finally:
            for side in sides:
                side.stop()
    print("| tokens | at once | after ms | other, ms | here, ms | here / other, median of the rounds | other, CPU ms | here, CPU ms |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for turn in TURNS:
        other, here = (side.took_ms[turn] for side in sides)
        cpu_ms = " | ".join(f"{statistics.mean(side.cpu_ms[turn]):.2f}" for side in sides)
        ratio = statistics.median(statistics.median(b) / statistics.median(a) for a, b in zip(other, here, strict=True))
        p50_ms = f"{statistics.median(chain(*other)):.2f} | {statistics.median(chain(*here)):.2f}"
        print(f"| {' | '.join(map(str, turn))} | {p50_ms} | {ratio:.3f} | {cpu_ms} |")


if __name__ == "__main__":
    main()
