"""Mixed load for a long time, and what has grown at its end: memory, descriptors, threads, latency.

`python benchmarks/bench_soak.py --help`. Beside a correct client: unary calls of 1 to 512 tokens, streams, deadlines of milliseconds, calls
that are cancelled, streams that are left in the middle, clients that come and go, a scrape every few seconds. Now and then all but the
correct client rest, and the processes are looked at. Exit code 1: one has grown by more than --growth since the end of the warm-up, an
answer was wrong or missing, or something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from running import HIDDEN, LAYERS, Running, Seen, correct_client, service

from moeserve import AsyncClient, MoEServeError
from moeserve.api.wire import WireRequest

SIZES = (1, 2, 7, 32, 128, 512)
#: how long the load rests: processes that are quiet give memory back
REST_S = 5.0
#: descriptors and threads that may be more at a look than at another
ALLOWED_FEW = 8


class Load:
    """What callers do, over and over until `end`."""

    def __init__(self, running: Running, end: float) -> None:
        self._running, self._end = running, end
        self._rows = {size: torch.randn(size, HIDDEN) for size in SIZES}
        self.outcomes: Counter[str] = Counter()
        #: cleared = it rests
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def run(self) -> None:
        async with AsyncClient(self._running.target, timeout=30) as client:
            ways: dict[str, Callable[[AsyncClient], Awaitable[Any]]] = {
                "unary": self._unary,
                "unary, too": self._unary,
                "stream": self._stream,
                "stream, left": self._leave,
                "too late": self._too_late,
                "cancelled": self._cancelled,
                "clients that come and go": self._come_and_go,
                "scrape": self._scrape,
            }
            await asyncio.gather(*(self._repeat(name, way, client) for name, way in ways.items()))

    async def _repeat(self, name: str, way: Callable[[AsyncClient], Awaitable[Any]], client: AsyncClient) -> None:
        while time.monotonic() < self._end:
            await self.goes_on.wait()
            try:
                await way(client)
                self.outcomes[f"{name}: done"] += 1
            except (MoEServeError, TimeoutError) as error:
                self.outcomes[f"{name}: {type(error).__name__}"] += 1
            await asyncio.sleep(random.uniform(0, 0.04))

    def _request(self) -> tuple[torch.Tensor, int]:
        return self._rows[random.choice(SIZES)], random.randrange(LAYERS)

    async def _unary(self, client: AsyncClient) -> None:
        rows, layer = self._request()
        await client.forward(rows, layer=layer)

    async def _stream(self, client: AsyncClient, taken: int = 40) -> None:
        requests = [WireRequest(*self._request(), request_id=str(number)) for number in range(40)]
        answers: Any = client.forward_stream(requests)
        for _ in range(taken):
            await anext(answers)
        await answers.aclose()

    async def _leave(self, client: AsyncClient) -> None:
        await self._stream(client, random.randrange(1, 20))

    async def _too_late(self, client: AsyncClient) -> None:
        await client.forward(self._rows[512], timeout=random.choice((0.001, 0.003, 0.01)))

    async def _cancelled(self, client: AsyncClient) -> None:
        await asyncio.wait_for(client.forward(self._rows[512]), random.uniform(0, 0.05))

    async def _come_and_go(self, _: AsyncClient) -> None:
        async with AsyncClient(self._running.target, timeout=30) as client:
            await self._unary(client)
        await asyncio.sleep(0.5)

    async def _scrape(self, _: AsyncClient) -> None:
        await asyncio.to_thread(self._running.gauges)
        await asyncio.sleep(3)


async def soak(running: Running, seconds: float, warm_up_s: float, rests: int) -> tuple[list[dict[str, Seen]], Counter[str]]:
    """What was seen at each rest, from the end of the warm-up on."""
    load = Load(running, time.monotonic() + seconds)
    loading, samples = asyncio.create_task(load.run()), list[dict[str, Seen]]()
    await asyncio.sleep(warm_up_s)
    for _ in range(rests):
        load.goes_on.clear()
        await asyncio.sleep(REST_S)
        samples.append(running.seen())
        load.goes_on.set()
        await asyncio.sleep(max(0, (seconds - warm_up_s) / rests - REST_S))
    await loading
    return samples, load.outcomes


def main() -> None:
    options = parse()
    seconds, warm_up_s = options.minutes * 60, options.warm_up * 60
    with tempfile.TemporaryDirectory() as name, service(Path(name), options.cluster) as running:
        with correct_client(running, Path(name), between_calls_s=0.1) as found:
            samples, outcomes = asyncio.run(soak(running, seconds, warm_up_s, options.rests))
        client, gauges = found[0], running.gauges()
        is_quiet = "Traceback" not in running.log.read_text()
    print(f"{options.minutes:g} minutes, hosts: {options.cluster}; seen at rest, from minute {options.warm_up:g} on\n")
    print("| process | " + " | ".join(f"{index + 1}" for index in range(len(samples))) + " | growth |")
    print("|---" + "|--:" * (len(samples) + 1) + "|")
    wrongs = []
    for process in samples[0]:
        memory = [one[process].resident_mib for one in samples]
        growth = median(memory[-3:]) / median(memory[:3]) - 1
        print(f"| {process}, MiB | {' | '.join(f'{one:.0f}' for one in memory)} | {growth:.1%} |")
        if growth > options.growth:
            wrongs.append(f"{process} has grown by {growth:.1%}")
        for field in ("descriptors", "threads"):
            counts = [getattr(one[process], field) for one in samples]
            print(f"| {process}, {field} | {' | '.join(f'{one:g}' for one in counts)} | {counts[-1] - counts[0]:+g} |")
            if counts[-1] > counts[0] + ALLOWED_FEW:
                wrongs.append(f"{process} has {counts[-1] - counts[0]:g} more {field}")
    tenth = max(1, len(client.seconds) // 10)
    first, last = (1000 * median(part) for part in (client.seconds[tenth : 2 * tenth], client.seconds[-tenth:]))
    print("\n| correct client: calls | wrong | failed | p50 ms | p99 ms | most ms | p50 in the second tenth, in the last |")
    print(f"|--:|--:|--:|--:|--:|--:|--:|\n| {client} | {first:.1f}, {last:.1f} |\n")
    print(", ".join(f"{what} {count}" for what, count in sorted(outcomes.items())))
    wrongs += [f"{name} is {value:g} at the end" for name, value in gauges.items() if value]
    wrongs += [f"{client.wrong} wrong answers"] if client.wrong else []
    wrongs += [f"{count} calls failed: {why}" for why, count in client.failed.items()]
    wrongs += [] if is_quiet else ["the log has a traceback"]
    print("\nnothing is wrong" if not wrongs else "\nWRONG:\n" + "\n".join(wrongs))
    raise SystemExit(bool(wrongs))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--warm-up", type=float, default=3, help="minutes")
    parser.add_argument("--rests", type=int, default=12, help="how often the processes are looked at")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory, as a share")
    parser.add_argument("--cluster", choices=("ray", "threads"), default="ray")
    return parser.parse_args()


if __name__ == "__main__":
    main()
