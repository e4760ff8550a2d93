"""A Forward through the service against the same layer in one process, transformers' own block, and a bare gRPC echo of the same bytes.

`make bench`, or `python benchmarks/bench_forward.py --help`. Repetitions of all sides are interleaved; medians are reported.
T tokens, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import torch
from bench_experts import ask, made
from echo_server import METHOD, OPTIONS
from running import served

import moeserve
from moeserve.allocator import keep_large_blocks

HIDDEN, EXPERTS, TOP_K = 1024, 8, 2
# OpenMP's threads spin for some milliseconds after their work; the next side must not pay for that.
_REST_S = 0.02
_BURST_S = 0.1
_LEAST_ROUNDS = 5
#: as between the tokens of a program that does something else, too: caches are cold, and cores sleep
_PAUSE_S = 0.01
TOKENS = (1, 16, 64, 256, 1024, 4096)
CONFIG = """
[model]
dtype = "{dtype}"
{layers}
[placement]
num_hosts = {hosts}
cpus_per_host = 1.0
[server]
port = 0
metrics_port = 0
"""
LAYER = """
[[layers]]
hidden_size = {hidden}
intermediate_size = {intermediate}
num_experts = {experts}
gating.top_k = {top_k}
"""
HEADER = (
    "| T | transformers tok/s | in process | one client | ratio | two clients | ratio | p50 | p99 | echo p50 | p99 | p50 / echo "
    "| without what it takes in process | after 10 ms: p50 | echo p50 |"
)

Call = Callable[[], object]
Echo = Callable[[bytes], bytes]


def main() -> None:
    options = parse()
    keep_large_blocks()
    torch.set_num_threads(2)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {cpu_model()}, 2 cores")
    print(", ".join(f"{name} {version(name)}" for name in ("moeserve", "ray", "torch", "grpcio", "pyzmq")))
    for dtype in options.dtypes:
        with echo_server() as echo:
            for hosts in options.hosts:
                with service(dtype, hosts, options.intermediate) as target, moeserve.Client(target, timeout=120) as client:
                    for layer, intermediate in enumerate(options.intermediate):
                        print(f"\n### {dtype}, I = {intermediate}, {hosts} hosts\n")
                        measure(client, echo, layer, intermediate, getattr(torch, dtype), options)


def measure(client: moeserve.Client, echo: Echo, layer: int, intermediate: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    local = moeserve.MoELayer(
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_experts=EXPERTS,
        dtype=dtype,
        gating=moeserve.GatingConfig(top_k=TOP_K),
    )
    sizes = {"hidden_size": HIDDEN, "intermediate_size": intermediate, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    model = made("mixtral", sizes, dtype)
    block = model.get_submodule("model.layers.0.mlp")
    print(HEADER)
    print("|--:" * HEADER.count(" |") + "|")
    pool = ThreadPoolExecutor(2)
    for tokens in options.tokens:
        hidden_states = torch.randn(tokens, HIDDEN).to(dtype)
        message = bytes(hidden_states.numel() * dtype.itemsize)

        def forward(_: int = 0, hidden_states: torch.Tensor = hidden_states) -> object:
            return client.forward(hidden_states, layer=layer)

        sides: list[Call] = [
            lambda: local(hidden_states),  # noqa: B023
            forward,
            lambda: list(pool.map(forward, range(2))),
            lambda: echo(message),  # noqa: B023
            *(partial(ask, model, block, name, hidden_states[None]) for name in ("eager", "grouped_mm")),
        ]
        one, served, pair, bare, *theirs = interleaved(sides, options.seconds)
        over_echo, more_over_echo = median(served) / median(bare), (median(served) - median(one)) / median(bare)
        cold, cold_bare = after_pauses([forward, sides[3]], options.seconds / 4)
        print(
            f"| {tokens} | {tokens / min(map(median, theirs)):,.0f} "
            f"| {tokens / median(one):,.0f} | {tokens / median(served):,.0f} | **{median(one) / median(served):.2f}** "
            f"| {2 * tokens / median(pair):,.0f} | **{2 * median(one) / median(pair):.2f}** "
            f"| {median(served) * 1e3:.2f} ms | {p99(served) * 1e3:.2f} ms | {median(bare) * 1e3:.2f} ms | {p99(bare) * 1e3:.2f} ms "
            f"| **{over_echo:.2f}** | **{more_over_echo:.2f}** | {median(cold) * 1e3:.2f} ms | {median(cold_bare) * 1e3:.2f} ms |",
            flush=True,
        )


def interleaved(sides: Sequence[Call], seconds: float) -> list[list[float]]:
    """Times of each side, in bursts taken in turn until `seconds` have passed, at least five each; the first call of a burst warms up."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < _LEAST_ROUNDS:
        rounds += 1
        for side, taken in zip(sides, times, strict=True):
            time.sleep(_REST_S)
            side()
            burst_end = time.perf_counter() + _BURST_S
            while (started := time.perf_counter()) < burst_end:
                side()
                taken.append(time.perf_counter() - started)
    return times


def after_pauses(sides: Sequence[Call], seconds: float) -> list[list[float]]:
    """Times of each side in turn, each call after it and everything else has slept, until `seconds` have passed."""
    times: list[list[float]] = [[] for _ in sides]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < _LEAST_ROUNDS:
        for side, taken in zip(sides, times, strict=True):
            time.sleep(_PAUSE_S)
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
    return times


def median(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]


def p99(times: Sequence[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * 0.99))]


@contextmanager
def service(dtype: str, hosts: int, intermediate: Sequence[int], server: str = "") -> Iterator[str]:
    """`moeserve serve` in a process of its own, with more lines in its [server]; yields host:port."""
    layers = "".join(LAYER.format(hidden=HIDDEN, intermediate=size, experts=EXPERTS, top_k=TOP_K) for size in intermediate)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "service.toml"
        config.write_text(CONFIG.format(dtype=dtype, hosts=hosts, layers=layers) + server)
        with served(config) as (target, _, _):
            yield target


@contextmanager
def echo_server() -> Iterator[Echo]:
    """The bare echo in a process of its own; yields a function that calls it."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("echo_server.py"))], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with grpc.insecure_channel(f"127.0.0.1:{int(process.stdout.readline())}", options=OPTIONS) as channel:
            call: Any = channel.unary_unary(METHOD)
            yield call
    finally:
        process.terminate()
        process.wait()


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--intermediate", nargs="+", type=int, default=[4096, 64])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=8.0, help="per row, all sides together")
    return parser.parse_args()


if __name__ == "__main__":
    main()
