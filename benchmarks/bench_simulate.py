"""`moeserve simulate` against the real thing: services of 2, 4 and 8 hosts on this machine, and what was said of them.

`python benchmarks/bench_simulate.py --help`. The services run one after the other, their hosts with one thread of torch each. Before it is
loaded, each has done a round of balancing. Costs are measured on the service with the fewest hosts only, and the load is what the rounds
have recorded. Medians over the rounds are compared. All of a service is on one machine, so `simulate` gets its cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_precision import cpu_model
from running import served

from moeserve.cli.app import main as main_of_moeserve

CONFIG = """
[[layers]]
name = "layer"
hidden_size = {hidden}
intermediate_size = {intermediate}
num_experts = {experts}
gating.top_k = {top_k}
[placement]
num_hosts = {hosts}
[balancing]
extra_copies = 0.25
[server]
port = 0
metrics_port = 0
admin_token_file = "{folder}/admin"
"""
HEADER = (
    "| H x I | T | at once | hosts | tokens/s | simulated | ratio | p99 ms | simulated | ratio |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores")
    print(", ".join(f"{name} {version(name)}" for name in ("moeserve", "torch", "grpcio")))
    print(HEADER, flush=True)
    for size in options.sizes:
        hidden, intermediate = map(int, size.split("x"))
        for line in compared(options, {"hidden": hidden, "intermediate": intermediate, "experts": options.experts, "top_k": options.top_k}):
            print(line, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", choices=("ray", "threads"), default="ray")
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024"], help="of experts: hidden x intermediate")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--loads", nargs="+", default=["64:1", "64:8", "512:4"], help="tokens : requests in progress")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration-s", type=float, default=4, help="of each load in a round")
    return parser.parse_args()


def compared(options: argparse.Namespace, layer: dict[str, int]) -> Iterator[str]:
    """A line of the table for each load and number of hosts."""
    with tempfile.TemporaryDirectory() as name:
        folder, hosts = Path(name), sorted(options.hosts)
        (folder / "admin").touch(0o600)
        (folder / "admin").write_text("of-the-administrator")
        for number in hosts:
            (folder / f"{number}.toml").write_text(CONFIG.format(folder=folder, hosts=number, **layer))
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for each in hosts:
            with served(folder / f"{each}.toml", options.cluster) as (target, _, _):
                moeserve("bench", target, "--tokens", "64", "--duration-s", "3")
                moeserve("rebalance", target, "--admin-token-file", str(folder / "admin"))
                if each == hosts[0]:
                    moeserve("bench", target, "--costs", str(folder / "costs"))
                for number in range(options.rounds):
                    for load in options.loads:
                        run = bench(target, load, options.duration_s, folder / f"{each}.{load}.{number}")
                        found.setdefault((load, each), []).append(run)
        print(f"costs: {(folder / 'costs').read_text()}", file=sys.stderr)
        for (load, each), runs in found.items():
            yield line(layer, load, each, typical(runs), simulated(folder, each, load))


def bench(target: str, load: str, duration_s: float, trace: Path) -> dict[str, Any]:
    tokens, concurrency = load.split(":")
    options = ("--tokens", tokens, "--concurrency", concurrency, "--duration-s", str(duration_s), "--record", str(trace), "--json")
    run = json.loads(moeserve("bench", target, *options))["runs"][0]
    assert not run["failed"], run
    return {"tokens_per_s": run["tokens_per_s"], "p99_ms": run["latency_ms"]["p99"]}


def simulated(folder: Path, hosts: int, load: str) -> dict[str, Any]:
    tokens, concurrency = load.split(":")
    machine = ("--nodes", "1", "--cores", str(os.cpu_count()), "--frontends", "1", "--costs", str(folder / "costs"))
    what = ("--tokens", tokens, "--concurrency", concurrency, "--load", str(folder / f"{hosts}.{load}.0"))
    told: dict[str, Any] = json.loads(moeserve("simulate", str(folder / f"{hosts}.toml"), *machine, *what, "--json"))
    return told


def line(layer: dict[str, int], load: str, hosts: int, real: dict[str, float], said: dict[str, Any]) -> str:
    tokens, concurrency = load.split(":")
    figures = [
        f"{real[name]:{form}} | {said[name]:{form}} | {said[name] / real[name]:.2f}"
        for name, form in (("tokens_per_s", ",.0f"), ("p99_ms", ".1f"))
    ]
    return f"| {layer['hidden']} x {layer['intermediate']} | {tokens} | {concurrency} | {hosts} | {' | '.join(figures)} |"


def typical(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def moeserve(*arguments: str) -> str:
    """A verb in this process, which has imported everything already."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main_of_moeserve(arguments)
    if code:
        raise SystemExit(f"moeserve {' '.join(arguments)}: exit code {code}")
    return out.getvalue()


if __name__ == "__main__":
    main()
