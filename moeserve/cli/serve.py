"""`moeserve serve`: everything in one process, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
from typing import Annotated

import torch
import typer

from moeserve.cli.flags import Overrides
from moeserve.cli.signals import on_signals, tell
from moeserve.config import ServiceConfig, load_config
from moeserve.server import keep_large_blocks
from moeserve.service import Service


def serve(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
) -> None:
    """Start (or join) Ray, put the experts on it, serve gRPC until Ctrl-C or SIGTERM, then drain."""
    config = load_config(source, overrides)
    # The hosts do the heavy work; idle threads of this process would only spin on their cores.
    torch.set_num_threads(1)
    keep_large_blocks()
    asyncio.run(_serve(config))


async def _serve(config: ServiceConfig) -> None:
    service = Service(config, progress=tell)
    stop = asyncio.Event()
    on_signals(stop.set)
    starting, stopping = asyncio.ensure_future(service.start()), asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        starting.cancel()
        await asyncio.wait({starting})
        raise KeyboardInterrupt
    await starting
    on_signals(stop.set)  # again: Ray installs handlers of its own when it starts
    tell(f"metrics at http://{service.metrics_target}/metrics")
    tell(f"ready {service.target}")
    asked = asyncio.ensure_future(service.controller.stop_requested.wait())
    broken = asyncio.ensure_future(service.broken.wait())
    await asyncio.wait({stopping, asked, broken}, return_when=asyncio.FIRST_COMPLETED)
    for waiting in (stopping, asked, broken):
        waiting.cancel()
    tell("draining; once more to stop at once")
    on_signals(None)
    await service.stop()
    if service.failure is not None:
        raise service.failure
    tell("stopped")
