"""`moeserve`: how it starts, and how errors and signals leave the program."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from moeserve.cli import signals, streams
from moeserve.errors import ConfigError, MoEServeError, ServiceUnreachable, explained

EXIT_FAILURE, EXIT_CONFIGURATION, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130
#: values of MOESERVE_DEBUG
_OFF: Final = ("", "0", "false", "no", "off")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 ok, 1 failure, 2 usage or configuration, 3 service unreachable, 128 + N ended by signal N (130 Ctrl-C, 143 SIGTERM).
    """
    import typer

    from moeserve.cli.verbs import app

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(arguments, prog_name="moeserve", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as exit_:
        return exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except signals.Ended as ended:
        if not ended.is_told:
            streams.tell(f"ended by {ended.number.name}")
        return ended.exit_code
    except Exception as error:
        if "--debug" in arguments or os.environ.get("MOESERVE_DEBUG", "").lower() not in _OFF:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    show = getattr(error, "show", None)
    if show is not None:  # click's usage errors print themselves
        _name_value(error)
        show()
        return EXIT_CONFIGURATION
    error = explained(error, "this command")
    known = isinstance(error, MoEServeError)
    streams.tell(f"error: {error}" if known else f"error: {type(error).__name__}: {error} (--debug shows where)")
    if isinstance(error, ServiceUnreachable):
        return EXIT_UNREACHABLE
    return EXIT_CONFIGURATION if isinstance(error, ConfigError) else EXIT_FAILURE


def _name_value(error: Any) -> None:
    """typer's sentence about an option says what is allowed; the value is only in pydantic's error behind it."""
    behind = getattr(error.__cause__, "errors", None)
    if behind is not None:
        error.message += f" (got {behind()[0]['input']!r})"


def entry() -> None:
    """The console script."""
    streams.make_safe()
    signals.end_at_once()
    try:
        import moeserve.cli.verbs  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(_report(error))
    try:
        signals.raise_ended()
        code = main()
    except signals.Ended as ended:
        code = ended.exit_code
    signals.ignore()
    _end(code)


def _end(code: int) -> NoReturn:
    """All that belongs to the end of a program, but Python is not taken apart under threads that are still in compiled code.

    These would abort the process: of a host that loads, as its kernels do, and of gRPC.
    """
    atexit._run_exitfuncs()
    os._exit(code)
