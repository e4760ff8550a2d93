"""The verbs: files of this folder, imported when one runs.

The first line of a verb's file is `moeserve NAME`, a colon, and the sentence that the list of verbs shows. The file has an object
called NAME: the function of the verb, or a `typer.Typer` of several.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

_FIRST_LINE: Final = re.compile(r'"""`moeserve (?P<name>\w+)`: (?P<help>.+?)(""")?\n')


def _found() -> dict[str, str]:
    """Name -> its line of help."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
    matches = {stem: match for stem, text in texts.items() if (match := _FIRST_LINE.match(text))}
    assert all(stem == match["name"] for stem, match in matches.items()), "a verb's file has the name of the verb"
    return {stem: match["help"][:1].upper() + match["help"][1:] for stem, match in matches.items()}


class _Verbs(Mapping[str, Any]):
    """Name -> the command, imported now."""

    def __init__(self) -> None:
        self.help = _found()

    def __getitem__(self, name: str) -> Any:
        if name not in self.help:
            raise KeyError(name)
        verb = getattr(import_module(f"moeserve.cli.{name}"), name)
        if not isinstance(verb, typer.Typer):
            function, verb = verb, typer.Typer(add_completion=False)
            verb.command(name)(function)
        return typer.main.get_command(verb)

    def __iter__(self) -> Iterator[str]:
        return iter(self.help)

    def __len__(self) -> int:
        return len(self.help)


class _VerbGroup(TyperGroup):
    """Lists verbs by names and lines; imports a verb only to run it, or to show its options."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.commands: Any = _Verbs()

    def list_commands(self, _context: Any) -> list[str]:
        return list(self.commands)

    def get_command(self, _context: Any, name: str) -> Any:
        return TyperCommand(name, help=self.commands.help[name]) if name in self.commands.help else None

    def resolve_command(self, context: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(context, args)
        return name, listed and self.commands[str(name)], rest


app = typer.Typer(
    name="moeserve",
    cls=_VerbGroup,
    help="Serve the experts of Mixture-of-Experts models.",
    no_args_is_help=True,
    invoke_without_command=True,
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and debug logs."),
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        from moeserve.files.version import running_version

        typer.echo(f"moeserve {running_version()}")
        raise typer.Exit
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
