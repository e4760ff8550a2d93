"""Many one-token calls at a time against one client with batches of 64, and large tensors through shared memory against messages.

`python benchmarks/bench_pipelining.py --help`. Sides take turns in bursts; medians are reported. The load comes from this process.
T tokens, H hidden size, I intermediate size, E experts, K choices per token.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from unittest.mock import patch

import torch
from bench_forward import HIDDEN, cpu_model, median, service

from moeserve import AsyncClient, Client
from moeserve.allocator import keep_large_blocks
from moeserve.client import memory

CALLERS = 64
_WARM_UP_S = 1.0
_PATIENCE_S = 300.0

#: asks for so many seconds; returns tokens/s
Side = Callable[[float], Awaitable[float]]


async def one_by_one(call: Callable[[], Awaitable[object]], tokens: int, callers: int, seconds: float) -> float:
    """tokens/s of so many callers, each with one call of `tokens` in progress."""
    answered, began = 0, time.perf_counter()

    async def caller() -> None:
        nonlocal answered
        while time.perf_counter() - began < seconds:
            await call()
            answered += tokens

    await asyncio.gather(*(caller() for _ in range(callers)))
    return answered / (time.perf_counter() - began)


async def measure(target: str, layer: int, intermediate: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    one, batch = torch.randn(1, HIDDEN).to(dtype), torch.randn(CALLERS, HIDDEN).to(dtype)
    many = [AsyncClient(target, timeout=_PATIENCE_S) for _ in range(CALLERS)]
    async with AsyncClient(target, timeout=_PATIENCE_S) as client, AsyncClient(target, timeout=_PATIENCE_S) as apart:
        apart._together._is_offered = False  # as before: a message for each
        turn = iter(range(10**9))
        sides: dict[str, Side] = {
            "one client, batches of 64": lambda s: one_by_one(lambda: client.forward(batch, layer=layer), CALLERS, 1, s),
            "64 tasks of one client": lambda s: one_by_one(lambda: client.forward(one, layer=layer), 1, CALLERS, s),
            "the same, a message for each": lambda s: one_by_one(lambda: apart.forward(one, layer=layer), 1, CALLERS, s),
            "64 clients of one loop": lambda s: one_by_one(lambda: many[next(turn) % CALLERS].forward(one, layer=layer), 1, CALLERS, s),
        }
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            await side(_WARM_UP_S)
        for _ in range(options.rounds):
            for name, side in sides.items():
                taken[name].append(await side(options.seconds))
    for other in many:
        await other.close()
    batched = median(taken["one client, batches of 64"])
    for name, rates in taken.items():
        print(f"| {intermediate} | {name} | {median(rates):,.0f} | {median(rates) / batched:.2f} |", flush=True)


def measure_memory(target: str, layer: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    shared = Client(target, timeout=_PATIENCE_S)
    with patch.object(memory, "_LARGE_BYTES", 2**62), Client(target, timeout=_PATIENCE_S) as plain:  # the threshold is read at each call
        for mebibytes in options.mebibytes:
            rows = torch.randn(mebibytes * 2**20 // HIDDEN // dtype.itemsize, HIDDEN).to(dtype)
            times: dict[int, list[float]] = {2**62: [], 2**18: []}
            for number in range(2 + options.calls):
                for threshold, taken in times.items():
                    with patch.object(memory, "_LARGE_BYTES", threshold):
                        began = time.perf_counter()
                        (plain if threshold > 2**30 else shared).forward(rows, layer=layer)
                        if number >= 2:
                            taken.append(time.perf_counter() - began)
            by_message, by_memory = map(median, times.values())
            saved = f"{1000 * (by_message - by_memory):.1f} | {by_message / by_memory:.2f}"
            print(f"| {mebibytes} | {1000 * by_message:.1f} | {1000 * by_memory:.1f} | {saved} |", flush=True)
    shared.close()


def main() -> None:
    options = parse()
    keep_large_blocks()
    torch.set_num_threads(1)
    print(f"{cpu_model()}, {options.dtype}, {options.hosts} hosts")
    dtype = getattr(torch, options.dtype)
    with service(options.dtype, options.hosts, options.intermediate, f"processes = {options.processes}\n") as target:
        print("\n| I | callers | tokens/s | of batches |\n|--:|---|--:|--:|")
        for layer, intermediate in enumerate(options.intermediate):
            asyncio.run(measure(target, layer, intermediate, dtype, options))
        print("\n| MiB of rows | messages ms | shared memory ms | saved ms | speedup |\n|--:|--:|--:|--:|--:|")
        measure_memory(target, len(options.intermediate) - 1, dtype, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--intermediate", nargs="+", type=int, default=[4096, 64])
    parser.add_argument("--mebibytes", nargs="*", type=int, default=[2, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each side in each round")
    parser.add_argument("--calls", type=int, default=15, help="of each side, with large tensors")
    return parser.parse_args()


if __name__ == "__main__":
    main()
