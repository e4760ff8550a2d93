"""`moeserve config`: look at a configuration without running it, or import another system's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeserve.checkpoints import layer_sources
from moeserve.cli.import_file import read_mapping, to_toml
from moeserve.cli.streams import say
from moeserve.compat import load
from moeserve.config import load_config
from moeserve.control import first_num_hosts, wanted_hosts
from moeserve.server import check_exposure

config_app = typer.Typer(help="Look at a configuration, or import another system's.", no_args_is_help=True)


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help="A TOML configuration or a checkpoint folder.")]) -> None:
    """Validate a configuration and the checkpoint it names; exit 2 with one sentence when something is wrong."""
    config = load_config(file)
    check_exposure(config.server)
    sources = layer_sources(config)
    wanted = wanted_hosts(first_num_hosts(config, sources), sources, config)
    hosts = f"{wanted.least} hosts or more" if wanted.num_hosts == "all" else f"{wanted.num_hosts} hosts"
    say(f"{file}: ok, {len(sources)} MoE layers on {hosts}")


@config_app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="The other system's configuration: JSON, YAML or TOML, by its suffix.")],
    system: Annotated[str, typer.Option("--from", help="deepspeed, colossalai, mindformers or trustformers.")],
) -> None:
    """Write another system's configuration as a service configuration (TOML) to the standard output; what it does not carry as comments."""
    typer.echo(to_toml(load(system, read_mapping(file)), system, file), nl=False)
