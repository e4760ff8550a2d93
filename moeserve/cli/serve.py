"""`moeserve serve`: everything in one process, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
from typing import Annotated

import torch
import typer

from moeserve.allocator import give_back_when_quiet, keep_large_blocks
from moeserve.cli.flags import Overrides
from moeserve.cli.serving import serve_until_told
from moeserve.cli.streams import tell
from moeserve.config import ServiceConfig, load_config
from moeserve.programs.service import Service
from moeserve.transport import give_back_pools


def serve(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
) -> None:
    """Start (or join) Ray, put the experts on it, serve gRPC until Ctrl-C or SIGTERM, then drain."""
    config = load_config(source, overrides)
    # The hosts do the heavy work; idle threads of this process would only spin on their cores.
    torch.set_num_threads(1)
    keep_large_blocks()
    give_back_when_quiet(give_back_pools)
    asyncio.run(_serve(config))


async def _serve(config: ServiceConfig) -> None:
    service = Service(config, progress=tell)
    await serve_until_told(service, service.start(), service.over)
