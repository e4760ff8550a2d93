"""`moeserve config`: look at a configuration without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeserve.checkpoints import layer_sources
from moeserve.config import load_config
from moeserve.placement import plan_placement
from moeserve.server import check_exposure

config_app = typer.Typer(help="Look at a configuration.", no_args_is_help=True)


@config_app.callback()
def _group() -> None:
    """Keeps `check` a verb of its own while it is the only one."""


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help="A TOML configuration or a checkpoint folder.")]) -> None:
    """Validate a configuration and the checkpoint it names; exit 2 with one sentence when something is wrong."""
    config = load_config(file)
    check_exposure(config.server)
    specs = [source.spec for source in layer_sources(config)]
    plan_placement(specs, config.placement)
    typer.echo(f"{file}: ok, {len(specs)} MoE layers on {config.placement.num_hosts} hosts")
