"""`moeserve`: the verbs, and how errors leave the program."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

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
from moeserve.errors import ConfigError, MoEServeError, ServiceUnreachable

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

EXIT_FAILURE, EXIT_CONFIGURATION, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and debug logs."),
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        typer.echo(f"moeserve {metadata.version('moeserve')}")
        raise typer.Exit
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 failure, 2 usage or configuration, 3 service unreachable, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.Abort:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if "--debug" in arguments or os.environ.get("MOESERVE_DEBUG"):
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    show = getattr(error, "show", None)
    if show is not None:  # click's usage errors know how they want to be shown
        show()
        return EXIT_CONFIGURATION
    known = isinstance(error, MoEServeError)
    print(f"error: {error}" if known else f"error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
    if isinstance(error, ServiceUnreachable):
        return EXIT_UNREACHABLE
    return EXIT_CONFIGURATION if isinstance(error, ConfigError) else EXIT_FAILURE


def entry() -> None:
    """The console script."""
    sys.exit(main())
