"""Batches through four layers on two pipeline stages: one batch after the other, and many at once over one stream."""

from __future__ import annotations

import asyncio
import time

import torch
from rich.console import Console
from rich.table import Table

import moeserve
from moeserve import AsyncClient
from moeserve.client import through_layers

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, BATCHES = 1024, 2048, 8, 256, 24


async def seconds(target: str, in_flight: int) -> float:
    batches = [torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16) for _ in range(BATCHES)]
    async with AsyncClient(target, timeout=300) as client:
        started = time.perf_counter()
        answers = [answer async for answer in through_layers(client, batches, range(4), in_flight=in_flight)]
        assert len(answers) == BATCHES
        return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    layer = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
    config = {
        "model": {"dtype": "bfloat16"},
        "layers": [{**layer, "name": f"layers.{number}", "seed": number} for number in range(4)],
        "placement": {"num_hosts": 2, "pipeline_stages": 2},
        "batching": {"max_batch_tokens": TOKENS},
        "server": {"port": 0, "metrics_port": 0},
    }
    table = Table("batches in flight", "tokens/s", title=f"{BATCHES} batches of {TOKENS} tokens through 4 layers, 2 stages of 1 host")
    with moeserve.serve(config) as service:
        asyncio.run(seconds(service.target, 4))
        for in_flight in (1, 2, 4, 8):
            best = min(asyncio.run(seconds(service.target, in_flight)) for _ in range(3))
            table.add_row(str(in_flight), f"{BATCHES * TOKENS / best:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
