"""What `resilience.hedge = "auto"` makes of a host that stands still for 50 ms in 5% of its passes.

`python benchmarks/bench_hedging.py --help`. Services of four hosts and two copies run as threads of this process, side by side: two are
well, in the others the first host is slow at random. All are asked the same in turn, by one client or by several.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from bench_precision import cpu_model

import moeserve
from moeserve.cluster.threads import ThreadCluster
from moeserve.config import ServedModel, load_config
from moeserve.loops import LoopThread
from moeserve.programs.serve import Service

SLOW_S, SLOW_SHARE = 0.05, 0.05
#: the hedging and whether a host is slow
SIDES = {
    "healthy, hedge off": ("off", False),
    "healthy, hedge auto": ("auto", False),
    "slow, hedge off": ("off", True),
    "slow, hedge auto": ("auto", True),
}


class SlowBank:
    """In place of an `ExpertBank`."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.chance = random.Random(7)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bank, name)

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        if self.chance.random() < SLOW_SHARE:
            time.sleep(SLOW_S)
        self.bank.run(*args, out=out)


class CountedBank:
    """Counts the rows that its host computes."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bank, name)

    def run(self, *args: torch.Tensor, out: torch.Tensor) -> None:
        self.rows += len(args[0])
        self.bank.run(*args, out=out)


@dataclass
class Side:
    """One service, and what its callers have seen."""

    client: moeserve.Client
    banks: list[CountedBank]
    seconds: list[float] = field(default_factory=list)
    rows: int = 0

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def side(layer: dict[str, Any], hedge: str, is_slow: bool) -> Iterator[Side]:
    config = {
        "layers": [layer],
        "placement": {"num_hosts": 4, "copies": 2},
        "resilience": {"hedge": hedge},
        "cluster": {"kind": "threads"},
        "server": {"port": 0, "metrics_port": 0},
    }
    read, thread = load_config(config), LoopThread("service")
    cluster = ThreadCluster(read.only(ServedModel), read.placement, read.ray)
    service = Service(read, cluster=cluster)
    thread.start()
    thread.call(service.start(), 60)
    try:
        banks = []
        for number, member in cluster.hosts.members.items():
            table = member.host.holdings.bank_table
            inner = table.bank(0, 1)
            banks.append(CountedBank(SlowBank(inner) if is_slow and number == 0 else inner))
            table.put(0, 1, banks[-1])  # type: ignore[arg-type]
        with moeserve.Client(service.target) as client:
            yield Side(client, banks)
    finally:
        thread.call(service.stop(), 60)
        thread.stop()


def ask(one: Side, rows: list[torch.Tensor], clients: int, pool: ThreadPoolExecutor, times: int) -> None:
    def call(client: int) -> list[float]:
        seconds = []
        for number in range(times):
            began = time.perf_counter()
            one.client.forward(rows[(client + number) % len(rows)])
            seconds.append(time.perf_counter() - began)
        return seconds

    for seconds in pool.map(call, range(clients)):
        one.seconds += seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--calls", type=int, default=4000, help="per side and row of the table")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=512)
    options = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores")
    print(", ".join(f"{name} {version(name)}" for name in ("moeserve", "torch", "grpcio")))
    layer = {"hidden_size": options.hidden, "intermediate_size": options.intermediate, "num_experts": 8, "gating": {"top_k": 2}}
    print("| T | clients | side | p50 ms | p99 ms | of healthy | extra rows |\n|--:|--:|---|--:|--:|--:|--:|")
    for tokens in options.tokens:
        for clients in options.clients:
            measure(layer, [torch.randn(tokens, options.hidden) for _ in range(97)], clients, options.calls)


def measure(layer: dict[str, Any], rows: list[torch.Tensor], clients: int, calls: int) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(clients) as pool:
        sides = {name: stack.enter_context(side(layer, *kind)) for name, kind in SIDES.items()}
        for one in sides.values():
            ask(one, rows, clients, pool, 200)
            one.seconds.clear()
            one.rows = sum(bank.rows for bank in one.banks)
        for _ in range(20):
            for one in sides.values():
                ask(one, rows, clients, pool, calls // 20 // clients)
        computed = {name: sum(bank.rows for bank in one.banks) - one.rows for name, one in sides.items()}
        base = sides["healthy, hedge off"].quantile_ms(0.99)
        for name, one in sides.items():
            extra = computed[name] / computed["healthy, hedge off"] - 1
            p99 = one.quantile_ms(0.99)
            print(
                f"| {len(rows[0])} | {clients} | {name} | {one.quantile_ms(0.5):.2f} | {p99:.2f} | {p99 / base:.2f} | {100 * extra:.1f}% |",
                flush=True,
            )


if __name__ == "__main__":
    main()
