"""`moeserve serve`: start a service in this process, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from moeserve.cli.flags import Overrides, with_config_flags
from moeserve.cli.serving import prepare_process, serve_until_told, tell_start
from moeserve.cli.signals import preparing
from moeserve.cli.streams import tell
from moeserve.config import ServiceConfig, load_config


@with_config_flags()
def serve(
    source: Annotated[str, typer.Argument(help="A TOML configuration or a checkpoint folder.")],
    overrides: Overrides,
) -> None:
    """Start expert hosts, serve gRPC until Ctrl-C or SIGTERM, then drain."""
    tell_start(f"reading {source}")
    config = load_config(source, overrides)
    prepare_process()
    asyncio.run(_serve(config))


async def _serve(config: ServiceConfig) -> None:
    with preparing():
        from moeserve.programs.controller import EndedBeforeReady
        from moeserve.programs.serve import Service

        service = Service(config, progress=tell)
    try:
        await serve_until_told(service, service.start(), service.over)
    except EndedBeforeReady as error:
        tell(str(error))
