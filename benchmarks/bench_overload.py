"""What a service does with more than it can do: goodput at several times its capacity, and a small caller beside a greedy one.

`python benchmarks/bench_overload.py --help`. The service runs as `moeserve serve`, its callers are processes of their own that speak plain
gRPC and never retry. With one host on two cores, callers and frontend share the core that is left. Goodput: requests answered within their
deadline. T tokens, H hidden size, I intermediate size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import torch
from bench_precision import cpu_model

from moeserve.api.wire import WireRequest, encode_forward_request

METHOD = "/moeserve.v1.MoEService/Forward"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
DEADLINE_S = 1.0
#: H, I, T of the requests that are too many
SIZES = {"small experts": (256, 1024, 512), "large experts": (128, 8192, 512)}
#: tokens of a request, and how many are in flight
GREEDY = ((512, 64), (65536, 4))
FAIR_HIDDEN, FAIR_INTERMEDIATE = 128, 256
CONFIG = """
[placement]
num_hosts = {hosts}
copies = {hosts}
[server]
port = 0
metrics_port = 0
"""
LAYER = """
[[layers]]
hidden_size = {hidden}
intermediate_size = {intermediate}
num_experts = 8
gating.top_k = 2
"""


@dataclass
class Calls:
    """What became of the calls of one caller: codes, and milliseconds of the answers and of the refusals."""

    seconds: float
    codes: dict[str, int]
    answered_ms: list[float]
    refused_ms: list[float]

    @property
    def goodput(self) -> float:
        return len(self.answered_ms) / self.seconds


class Caller:
    """Plain gRPC, no retries."""

    def __init__(self, target: str, tokens: int, hidden: int, layer: int, connections: int) -> None:
        self._channels = [grpc.aio.insecure_channel(target, options=OPTIONS) for _ in range(connections)]
        self._calls: list[Any] = [channel.unary_unary(METHOD) for channel in self._channels]
        self._message = encode_forward_request(WireRequest(torch.randn(tokens, hidden), layer=layer))
        self._seen: list[tuple[str, float]] = []
        self._count = 0

    async def one(self, timeout_s: float) -> None:
        self._count += 1
        started = time.perf_counter()
        try:
            await self._calls[self._count % len(self._calls)](self._message, timeout=timeout_s)
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        self._seen.append((code, 1e3 * (time.perf_counter() - started)))

    def result(self, seconds: float) -> Calls:
        by_code = {name: [ms for code, ms in self._seen if code == name] for name in ("OK", "RESOURCE_EXHAUSTED")}
        return Calls(seconds, dict(Counter(code for code, _ in self._seen)), *by_code.values())

    async def closed_loop(self, in_flight: int, seconds: float, timeout_s: float = 60.0, pause_s: float = 0.02) -> Calls:
        """`in_flight` calls at any time."""
        end = time.perf_counter() + seconds

        async def worker() -> None:
            while time.perf_counter() < end:
                await self.one(timeout_s)
                if self._seen[-1][0] != "OK":
                    await asyncio.sleep(pause_s)

        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return self.result(seconds)

    async def open_loop(self, rate: float, seconds: float) -> Calls:
        """`rate` calls a second, whatever becomes of them."""
        started, sent = time.perf_counter(), 0
        tasks: set[asyncio.Task[None]] = set()
        while (passed := time.perf_counter() - started) < seconds:
            for _ in range(int(passed * rate) - sent):
                task = asyncio.create_task(self.one(DEADLINE_S))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            await asyncio.sleep(0.002)
        if tasks:
            await asyncio.wait(tasks, timeout=10)
        return self.result(seconds)


@dataclass
class Fleet:
    """What `moeserve serve` is told."""

    cluster: str
    hosts: int


@contextmanager
def service(fleet: Fleet, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """host:port and process id."""
    layers = "".join(LAYER.format(hidden=hidden, intermediate=intermediate) for hidden, intermediate in sizes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "service.toml"
        file.write_text(layers + CONFIG.format(hosts=fleet.hosts))
        command = [sys.executable, "-m", "moeserve", "serve", str(file), "--cluster", fleet.cluster]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if ready := re.match(r"ready (\S+)", line):
                    yield ready[1], process.pid
                    break
            else:
                raise SystemExit("the service did not start")
        finally:
            process.terminate()
            process.wait()


def spawn(*arguments: object) -> subprocess.Popen[str]:
    """A caller in a process of its own; its last line is what became of its calls."""
    command = [sys.executable, __file__, "--caller", json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> Calls:
    answer, _ = process.communicate()
    return Calls(**json.loads(answer.splitlines()[-1]))


def call(kind: str, target: str, tokens: int, hidden: int, layer: int, load: float, seconds: float) -> None:
    """What a process started by `spawn` does."""

    async def run() -> Calls:
        caller = Caller(target, tokens, hidden, layer, 4 if kind == "open" else 1)
        return await (caller.open_loop(load, seconds) if kind == "open" else caller.closed_loop(int(load), seconds))

    print(json.dumps(vars(asyncio.run(run()))))


def overload(fleet: Fleet, name: str, multiples: Sequence[float], seconds: float) -> None:
    """Rows: offered load, goodput, what was refused and how soon."""
    hidden, intermediate, tokens = SIZES[name]
    with service(fleet, [(hidden, intermediate)]) as (target, pid):
        where = target, tokens, hidden, 0
        ended(spawn("closed", *where, 4, 2.0))
        idle = rss_mb(pid)
        peak = ended(spawn("closed", *where, 16, seconds)).goodput
        print(f"\n### {name}: H = {hidden}, I = {intermediate}, T = {tokens}; 16 in flight: {peak:.0f} requests/s\n")
        print("| offered | goodput | of the peak | answered p50 | p99 | refused | p50 | p99 | late | memory / idle |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
        for multiple in multiples:
            seen = ended(spawn("open", *where, peak * multiple, seconds))
            late = sum(count for code, count in seen.codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED"))
            answered, refused = (f"{ms(times, 0.5)} | {ms(times, 0.99)}" for times in (seen.answered_ms, seen.refused_ms))
            print(
                f"| {multiple:g}x | {seen.goodput:.0f}/s | **{seen.goodput / peak:.2f}** | {answered} "
                f"| {len(seen.refused_ms)} | {refused} | {late} | {rss_mb(pid) / idle:.2f} |",
                flush=True,
            )
        after = ended(spawn("closed", *where, 16, seconds)).goodput
        print(f"\nat once afterwards, 16 in flight: {after / peak:.2f} of the peak")


def fairness(fleet: Fleet, seconds: float) -> None:
    """Rows: where the greedy caller is, and what the small one gets."""
    with service(fleet, [(FAIR_HIDDEN, FAIR_INTERMEDIATE)] * 2) as (target, _):
        small = target, 1, FAIR_HIDDEN, 0, 1
        ended(spawn("closed", *small, 2.0))
        alone = ended(spawn("closed", *small, seconds))
        sizes = f"H = {FAIR_HIDDEN}, I = {FAIR_INTERMEDIATE}"
        print(f"\n### One token at a time beside a greedy caller: {sizes}\n")
        print("| greedy caller | p50 | of alone | p99 | of alone | refused | failed | greedy tokens/s |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        base = pick(alone.answered_ms, 0.5), pick(alone.answered_ms, 0.99)
        print(f"| none | {base[0]:.2f} ms | 1 | {base[1]:.1f} ms | 1 | 0 | 0 | – |")
        for (tokens, in_flight), (layer, words) in product(GREEDY, ((0, "on the same layer"), (1, "on another layer"))):
            greedy = spawn("closed", target, tokens, FAIR_HIDDEN, layer, in_flight, seconds + 6)
            time.sleep(4)
            seen = ended(spawn("closed", *small, seconds))
            taken = ended(greedy).goodput * tokens
            p50, p99, refused = pick(seen.answered_ms, 0.5), pick(seen.answered_ms, 0.99), len(seen.refused_ms)
            failed = sum(seen.codes.values()) - seen.codes.get("OK", 0) - refused
            of_alone = f"**{p50 / base[0]:.1f}** | {p99:.1f} ms | {p99 / base[1]:.1f}"
            print(f"| {in_flight} x {tokens}, {words} | {p50:.2f} ms | {of_alone} | {refused} | {failed} | {taken:,.0f} |", flush=True)


def pick(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))] if times else float("nan")


def ms(times: Sequence[float], share: float) -> str:
    return f"{pick(times, share):.0f} ms" if times else "–"


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*SIZES, "fair"], choices=[*SIZES, "fair"])
    parser.add_argument("--multiples", nargs="+", type=float, default=[0.8, 1, 3, 8])
    parser.add_argument("--seconds", type=float, default=6.0, help="per row")
    parser.add_argument("--cluster", default="threads", choices=["threads", "ray"])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--caller", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.caller:
        call(*json.loads(options.caller))
        return
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores")
    print(", ".join(f"{name} {version(name)}" for name in ("moeserve", "torch", "grpcio")))
    fleet = Fleet(options.cluster, options.hosts)
    for part in options.parts:
        if part == "fair":
            fairness(fleet, options.seconds)
        else:
            overload(fleet, part, options.multiples, options.seconds)


if __name__ == "__main__":
    main()
