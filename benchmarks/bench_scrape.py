"""What looking at a service costs those who use it: requests while /metrics is scraped, a page is open, or `moeserve top` runs.

`python benchmarks/bench_scrape.py --help`. One client sends requests of 8 tokens one after the other, a hundred a second; the ways of
looking take turns, a program of its own each. p50, p99 and max are of the requests, the last two columns of the looks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import moeserve

HIDDEN, TOP_K, TOKENS = 16, 8, 8
_REQUEST_S = 0.01
LAYER = """
[[layers]]
name = "model.layers.{layer}.mlp"
hidden_size = {hidden}
intermediate_size = {hidden}
num_experts = {experts}
seed = {layer}
gating.top_k = {top_k}
"""
CONFIG = """
[placement]
num_hosts = 2
[server]
port = 0
metrics_port = 0
[observability]
expert_detail = "{detail}"
{layers}
"""
LOOKER = """
import json, sys, time, urllib.request
import moeserve
url, target, headers, period_s, seconds = json.loads(sys.argv[1])
client = moeserve.Client(target)
urllib.request.install_opener(urllib.request.build_opener())
def look():
    if not url:
        return client.stats().layers and 0
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return len(answer.read())
looks, end = [], time.monotonic() + seconds
print("looking", flush=True)
while time.monotonic() < end:
    began = time.monotonic()
    size = look()
    looks.append((time.monotonic() - began, size))
    time.sleep(max(0, min(end, began + period_s) - time.monotonic()))
print(json.dumps(looks))
"""
#: what is looked at ("" = GetStats), with which headers, how often
WAYS: dict[str, tuple[str, dict[str, str], float] | None] = {
    "nobody looks": None,
    "/metrics every 15 s": ("/metrics", {}, 15),
    "/metrics every 1 s": ("/metrics", {}, 1),
    "the same, gzip": ("/metrics", {"Accept-Encoding": "gzip"}, 1),
    "the page, open": ("/stats.json", {}, 1),
    "`moeserve top`": ("", {}, 1),
}


def main() -> None:
    options = parse()
    requests: dict[str, list[float]] = {way: [] for way in WAYS}
    looks: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    with service(options) as (target, base), moeserve.Client(target) as client:
        hidden_states = torch.randn(TOKENS, HIDDEN)
        for layer in range(options.layers):
            client.forward(hidden_states, layer=layer)
        for _ in range(options.rounds):
            for way, what in WAYS.items():
                with looking(what, target, base, options.seconds) as found:
                    requests[way] += latencies(client, hidden_states, options.layers, options.seconds)
                looks[way] += found
    print(f"{options.layers} layers x {options.experts} experts, {options.detail}, {options.rounds} x {options.seconds:g} s each\n")
    print("| | p50 ms | p99 ms | max ms | a look: median, most ms | MB |\n|---|--:|--:|--:|--:|--:|")
    for way in WAYS:
        print(f"| {way} | {' | '.join(f'{1000 * value:.1f}' for value in summary(requests[way]))} | {described(looks[way])} |")


def latencies(client: moeserve.Client, hidden_states: torch.Tensor, layers: int, seconds: float) -> list[float]:
    found, end = list[float](), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        client.forward(hidden_states, layer=len(found) % layers)
        found.append(time.perf_counter() - began)
        time.sleep(max(0.0, began + _REQUEST_S - time.perf_counter()))
    return found


@contextmanager
def looking(what: tuple[str, dict[str, str], float] | None, target: str, base: str, seconds: float) -> Iterator[list[tuple[float, int]]]:
    """Yields a list that holds duration and bytes of each look at the end."""
    looks: list[tuple[float, int]] = []
    if what is None:
        yield looks
        return
    path, headers, period_s = what
    arguments = json.dumps([path and base + path, target, headers, period_s, seconds])
    with subprocess.Popen([sys.executable, "-c", LOOKER, arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield looks
        looks += json.loads(process.stdout.readline())


def summary(times: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], ordered[-1]


def described(looks: Sequence[tuple[float, int]]) -> str:
    if not looks:
        return "– | –"
    median, _, most = summary([seconds for seconds, _ in looks])
    size = max(size for _, size in looks)
    return f"{1000 * median:.0f}, {1000 * most:.0f} | {size / 1e6:.2f}" if size else f"{1000 * median:.0f}, {1000 * most:.0f} | –"


@contextmanager
def service(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """`moeserve serve` in a process of its own; yields host:port and the address of the metrics port."""
    sizes = {"hidden": HIDDEN, "experts": options.experts, "top_k": TOP_K}
    layers = "".join(LAYER.format(layer=layer, **sizes) for layer in range(options.layers))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "service.toml"
        file.write_text(CONFIG.format(detail=options.detail, layers=layers))
        command = [sys.executable, "-c", "from moeserve.cli.app import entry; entry()", "serve", str(file)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            told = dict[str, str]()
            try:
                for line in process.stderr:
                    if found := re.match(r"(ready|metrics at) (\S+)", line):
                        told[found[1]] = found[2]
                    if "ready" in told:
                        yield told["ready"], told["metrics at"].removesuffix("/metrics")
                        break
                else:
                    raise SystemExit("the service did not start")
            finally:
                process.terminate()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--detail", default="full", choices=("full", "top", "off"))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each way of looking, each time")
    parser.add_argument("--rounds", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
