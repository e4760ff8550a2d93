"""What balancing makes of a skewed load: how even the hosts get, how soon, what callers notice meanwhile, and what it gains.

`python benchmarks/bench_balancing.py --help`. A service of four hosts runs as threads of this process, without balancing and with it, in
turn. Callers have routed already, by Zipf's law; after a while other experts are the busy ones. Two cores cannot give four hosts a core
each, so a pass takes --pair-us for each (row, expert) pair, during which its host sleeps, as it does while a device computes; all else is
real.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from bench_precision import cpu_model

import moeserve
from moeserve.cluster.threads import ThreadCluster
from moeserve.config import ServedModel, ServiceConfig, load_config
from moeserve.host import Holdings, Where
from moeserve.loops import LoopThread
from moeserve.placement import layer_balancedness
from moeserve.programs.serve import Service

EXPERTS, HIDDEN, TOP_K, EVEN = 16, 64, 2, 0.9


class DeviceBank:
    """In place of an `ExpertBank`: the pass takes as long as a device would."""

    def __init__(self, bank: Any, pair_s: float) -> None:
        self._bank, self._pair_s = bank, pair_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank, name)

    def run(self, hidden_states: torch.Tensor, row_index: torch.Tensor, *args: torch.Tensor, out: torch.Tensor) -> None:
        end = time.perf_counter() + self._pair_s * len(row_index)
        self._bank.run(hidden_states, row_index, *args, out=out)
        time.sleep(max(0.0, end - time.perf_counter()))


class Devices(ThreadCluster):
    """Hosts that each have a device of their own."""

    def __init__(self, config: ServiceConfig, pair_s: float) -> None:
        super().__init__(config.only(ServedModel), config.placement, config.ray)
        self._pair_s = pair_s

    def _hold(self, number: int, where: Where) -> Holdings:
        holdings = super()._hold(number, where)
        find = holdings.bank_table.bank

        def bank(layer: int, epoch: int) -> Any:
            found = find(layer, epoch)
            return None if found is None else DeviceBank(found, self._pair_s)

        holdings.bank_table.bank = bank  # type: ignore[method-assign]
        return holdings


@dataclass
class Seen:
    """Times at which calls began, with their seconds; times at which the placement changed; how even it was, by time."""

    calls: list[tuple[float, float]] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def between(self, begin: float, end: float) -> list[float]:
        return sorted(seconds for at, seconds in self.calls if begin <= at < end)


def quantile_ms(ordered: Sequence[float], share: float) -> float:
    return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def zipf(reverse: bool) -> np.ndarray:
    share: np.ndarray = np.arange(1, EXPERTS + 1) ** -1.2 / np.sum(np.arange(1, EXPERTS + 1) ** -1.2)
    return share[::-1] if reverse else share


@contextmanager
def serving(options: argparse.Namespace, enabled: bool) -> Iterator[Service]:
    config = load_config(
        {
            "layers": [{"hidden_size": HIDDEN, "intermediate_size": 32, "num_experts": EXPERTS, "gating": {"top_k": TOP_K}}],
            "placement": {"num_hosts": 4},
            "cluster": {"kind": "threads"},
            "server": {"port": 0, "metrics_port": 0},
            "balancing": {"enabled": enabled, "extra_copies": 0.5, "interval_s": options.interval, "window_s": options.window},
        }
    )
    thread, service = LoopThread("service"), Service(config, cluster=Devices(config, options.pair_us / 1e6))
    thread.start()
    thread.call(service.start(), 60)
    try:
        yield service
    finally:
        thread.call(service.stop(), 60)
        thread.stop()


def evenness(service: Service, share: np.ndarray) -> float:
    (even,) = layer_balancedness(service.controller.state.release.placement, [share])
    return float("nan") if even is None else even


def load(service: Service, options: argparse.Namespace, seen: Seen, share: list[np.ndarray], stop: threading.Event) -> None:
    """One caller: `share` has the load as it is now."""
    chooser = torch.Generator().manual_seed(threading.get_native_id())
    rows, weights = torch.randn(options.tokens, HIDDEN), torch.full((options.tokens, TOP_K), 1 / TOP_K)
    with moeserve.Client(service.target, retry=False) as client:
        while not stop.is_set():
            odds = torch.from_numpy(share[0].copy()).expand(options.tokens, EXPERTS)
            ids = torch.multinomial(odds, TOP_K, generator=chooser)
            began = time.monotonic()
            try:
                client.forward(rows, topk_ids=ids, topk_weights=weights)
            except moeserve.MoEServeError as error:
                seen.failed.append(str(error))
            seen.calls.append((began, time.monotonic() - began))


def watch(service: Service, seen: Seen, share: list[np.ndarray], stop: threading.Event) -> list[tuple[float, float]]:
    """How even the hosts are by the load of the moment, over time."""
    even, epoch = list[tuple[float, float]](), service.controller.state.release.epoch
    while not stop.wait(0.01):
        if (now := service.controller.state.release.epoch) != epoch:
            epoch = now
            seen.changes.append(time.monotonic())
        even.append((time.monotonic(), evenness(service, share[0])))
    return even


def measure(options: argparse.Namespace, enabled: bool) -> None:
    seen, share, stop = Seen(), [zipf(False)], threading.Event()
    with serving(options, enabled) as service, ThreadPoolExecutor(options.clients + 1) as pool:
        begin = time.monotonic()
        watching = pool.submit(watch, service, seen, share, stop)
        callers = [pool.submit(load, service, options, seen, share, stop) for _ in range(options.clients)]
        time.sleep(options.seconds)
        turned = time.monotonic()
        share[0] = zipf(True)
        time.sleep(options.seconds)
        end = time.monotonic()
        stop.set()
        for caller in callers:
            caller.result()
        report(options, enabled, seen, watching.result(), (begin, turned, end))


def report(
    options: argparse.Namespace, enabled: bool, seen: Seen, even: list[tuple[float, float]], times: tuple[float, float, float]
) -> None:
    for what, begin, end in (("steady", times[0], times[1]), ("turned", times[1], times[2])):
        reached = next((at - begin for at, ratio in even if begin <= at < end and ratio >= EVEN), None)
        changes = [at for at in seen.changes if begin <= at < end]
        before = seen.between(begin + 1, changes[0] if changes else end)
        during = seen.between(changes[0] - 0.25, changes[-1] + 0.25) if changes else []
        last = seen.between(end - options.seconds / 3, end)
        rate = len(last) * options.tokens / (options.seconds / 3)
        first, final = (ratio for _, ratio in (next(one for one in even if one[0] >= begin), [one for one in even if one[0] < end][-1]))
        print(
            f"| {'balancing' if enabled else 'none'} | {what} | {first:.2f} | {final:.2f} | "
            f"{'–' if reached is None else f'{reached:.1f} s'} | {len(changes)} | {rate:,.0f} | "
            f"{quantile_ms(before, 0.99):.1f} | {quantile_ms(during, 0.99):.1f} | {quantile_ms(last, 0.99):.1f} | {len(seen.failed)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=24, help="of each of the two loads")
    parser.add_argument("--interval", type=float, default=4)
    parser.add_argument("--window", type=float, default=8)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pair-us", type=float, default=40)
    parser.add_argument("--times", type=int, default=2)
    options = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, {options.tokens} tokens, {options.clients} clients")
    print(", ".join(f"{name} {version(name)}" for name in ("moeserve", "torch")))
    print(f"interval {options.interval:g} s, window {options.window:g} s, {options.pair_us:g} us a pair\n")
    print(
        f"| | load | balancedness at first | at the end | until {EVEN} | changes | tokens/s at the end | p99 ms before the first change | "
        "during | at the end | failed |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for _ in range(options.times):
        for enabled in (False, True):
            measure(options, enabled)


if __name__ == "__main__":
    main()
