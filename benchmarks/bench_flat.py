"""What a request costs as the model and the fleet grow, while its own work stays the same: the same experts, on the same two hosts.

`python benchmarks/bench_flat.py --help`. All services are up, hosts as threads of one torch thread each; they are asked in turn, for a
moment. Callers have routed: every request asks 4 experts of each of two hosts, so equal weights are read however many others there are.
With T = 1 the gate is asked as well, and more hosts with it. CPU is what the process of the service has used; callers are elsewhere.
`--start`: instead, how long `moeserve serve` takes to start 8 hosts on a Ray of its own.

T tokens, K choices per token, E experts, D hosts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from bench_precision import cpu_model
from running import served

import moeserve

HIDDEN, INTERMEDIATE, TOP_K = 256, 128, 8
CONFIG = """
[[layers]]
hidden_size = {hidden}
intermediate_size = {intermediate}
num_experts = {experts}
gating.top_k = {top_k}
[placement]
num_hosts = {hosts}
[server]
port = 0
metrics_port = 0
"""
#: (E, D); the first is what others are compared with
FLEETS = ((8, 2), (64, 2), (256, 2), (64, 4), (64, 16))
LOADS = ("1, gate", "1", "64", "512")


@dataclass
class Fleet:
    """A service: its process, and of each load the milliseconds of each call, and CPU milliseconds of a call in each turn."""

    pid: int
    client: moeserve.Client
    experts: list[int]
    taken_ms: dict[str, list[float]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)

    def turn(self, load: str, seconds: float) -> None:
        """Asks for so long, one call after the other."""
        call = self._call(load)
        call()
        used, taken, end = self._cpu_s(), [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - began))
        self.taken_ms.setdefault(load, []).extend(taken)
        self.cpu_ms.setdefault(load, []).append(1e3 * (self._cpu_s() - used) / len(taken))

    def _call(self, load: str) -> Callable[[], object]:
        tokens, gate = int(load.partition(",")[0]), "gate" in load
        rows = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0))
        if gate:
            return lambda: self.client.forward(rows, layer=0)
        ids, weights = torch.tensor(self.experts).repeat(tokens, 1), torch.full((tokens, TOP_K), 1 / TOP_K)
        return lambda: self.client.forward(rows, layer=0, topk_ids=ids, topk_weights=weights)

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    options = parse()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, moeserve {version('moeserve')}, torch {version('torch')}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.start:
            began = time.perf_counter()
            stack.enter_context(served(config(folder, 64, 8), "ray"))
            print(f"8 hosts of a Ray of their own were ready after {time.perf_counter() - began:.1f} s")
            return
        fleets = [fleet(stack, folder, experts, hosts) for experts, hosts in FLEETS]
        for _ in range(options.rounds):
            for load in LOADS:
                for each in fleets:
                    each.turn(load, options.turn_s)
        print("\n".join(rows(fleets)))


def rows(fleets: Sequence[Fleet]) -> Iterator[str]:
    """Lines of Markdown: milliseconds, and as a share of those of the first fleet."""
    yield "| experts | hosts | " + " | ".join(f"T = {load}: p50 ms | | CPU ms | " for load in LOADS) + "|"
    yield "|--:|--:|" + "--:|--:|--:|--:|" * len(LOADS)
    for (experts, hosts), each in zip(FLEETS, fleets, strict=True):
        cells = []
        for load in LOADS:
            for now, first in ((each.taken_ms, fleets[0].taken_ms), (each.cpu_ms, fleets[0].cpu_ms)):
                cells.append(f"{median(now[load]):.2f} | {median(now[load]) / median(first[load]):.2f}")
        yield f"| {experts} | {hosts} | " + " | ".join(cells) + " |"


def fleet(stack: ExitStack, folder: Path, experts: int, hosts: int) -> Fleet:
    target, pid, _ = stack.enter_context(served(config(folder, experts, hosts), "threads"))
    client = stack.enter_context(moeserve.Client(target, timeout=60))
    placed = client.stats().layers[0].placement
    return Fleet(pid, client, [expert for one in placed[:2] for expert in one.experts[: TOP_K // 2]])


def config(folder: Path, experts: int, hosts: int) -> Path:
    file = folder / f"{experts}-{hosts}.toml"
    file.write_text(CONFIG.format(hidden=HIDDEN, intermediate=INTERMEDIATE, top_k=TOP_K, experts=experts, hosts=hosts))
    return file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turn-s", type=float, default=0.4)
    parser.add_argument("--start", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
