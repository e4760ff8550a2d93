"""`moeserve serve`: everything in one process, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from moeserve.cli.flags import Overrides
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
    service = Service(config, progress=_tell)
    stop = asyncio.Event()
    _on_signals(stop.set)
    starting, stopping = asyncio.ensure_future(service.start()), asyncio.ensure_future(stop.wait())
    asked = asyncio.ensure_future(service.stop_requested.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        starting.cancel()
        await asyncio.wait({starting})
        raise KeyboardInterrupt
    await starting
    _on_signals(stop.set)  # again: Ray installs handlers of its own when it starts
    _tell(f"metrics at http://{service.metrics_target}/metrics")
    _tell(f"ready {service.target}")
    await asyncio.wait({stopping, asked}, return_when=asyncio.FIRST_COMPLETED)
    for waiting in (stopping, asked):
        waiting.cancel()
    _tell("draining; once more to stop at once")
    _on_signals(None)
    await service.stop()
    _tell("stopped")


def _on_signals(act: Callable[[], None] | None) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if act is None:
            loop.remove_signal_handler(number)
        else:
            loop.add_signal_handler(number, act)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
