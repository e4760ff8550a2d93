"""`moeserve config`: check a configuration, or import another system's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeserve.cli.signals import preparing
from moeserve.cli.streams import say
from moeserve.errors import number_of

config = typer.Typer(help="Look at a configuration, or import another system's.", no_args_is_help=True)


@config.command()
def check(file: Annotated[Path, typer.Argument(help="A TOML configuration or a checkpoint folder.")]) -> None:
    """Check a configuration and its checkpoint. Exit code 2: something is wrong, and one sentence says what."""
    from moeserve.config import load_config

    loaded = load_config(file)
    with preparing():
        from moeserve.checkpoints import ServedLayers
        from moeserve.control import Planner
        from moeserve.server.security import check_exposure

    check_exposure(loaded.server)
    layers = ServedLayers.read(loaded)
    planner = Planner(layers, loaded.placement, loaded.ray.address is None, loaded.balancing, loaded.autoscaling)
    wanted = planner.wanted(planner.first_num_hosts())
    if loaded.autoscaling.enabled:
        planner.bounds()
    hosts = f"{number_of(wanted.least, 'host')} or more" if wanted.num_hosts == "all" else number_of(wanted.num_hosts, "host")
    say(f"{file}: ok, {number_of(len(layers.sources), 'MoE layer')} on {hosts}")


@config.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="The other system's configuration: JSON, YAML or TOML, by its suffix.")],
    system: Annotated[str, typer.Option("--from", help="deepspeed, colossalai, mindformers or trustformers.")],
) -> None:
    """Convert another system's configuration to TOML on the standard output; what cannot be converted becomes comments."""
    with preparing():
        from moeserve.cli.import_file import read_mapping, to_toml
        from moeserve.compat import load

    typer.echo(to_toml(load(system, read_mapping(file)), system, file), nl=False)
