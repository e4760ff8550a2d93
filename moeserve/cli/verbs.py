"""The verbs."""

from __future__ import annotations

import logging

import typer

from moeserve.cli.bench import bench
from moeserve.cli.config import config_app
from moeserve.cli.deploy import deploy
from moeserve.cli.flags import with_config_flags
from moeserve.cli.frontend import frontend
from moeserve.cli.infer import infer
from moeserve.cli.leave import leave
from moeserve.cli.plan import plan
from moeserve.cli.scale import drain, scale
from moeserve.cli.serve import serve
from moeserve.cli.shutdown import shutdown
from moeserve.cli.status import status
from moeserve.cli.swap import swap
from moeserve.cli.top import top
from moeserve.cli.version import running_version

app = typer.Typer(
    name="moeserve",
    help="Serve the experts of Mixture-of-Experts models.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
)
app.command()(with_config_flags(serve))
app.command()(with_config_flags(deploy))
app.command()(with_config_flags(plan))
app.command()(with_config_flags(frontend, tables=("server",), without=("admin_token_file",)))
app.command()(infer)
app.command()(swap)
app.command()(status)
app.command()(scale)
app.command()(drain)
app.command()(leave)
app.command()(shutdown)
app.command()(bench)
app.command()(top)
app.add_typer(config_app, name="config")


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and debug logs."),
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        typer.echo(f"moeserve {running_version()}")
        raise typer.Exit
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
