"""Every scalar key of the configuration as a flag and an environment variable: --num-hosts, MOESERVE_NUM_HOSTS."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from moeserve.config import ServiceConfig

_TABLES = ("server", "model", "placement", "batching", "communication", "resilience", "observability", "controller", "cluster", "ray")
#: flags and variables whose names differ from their key
_NAMES = {("cluster", "kind"): "cluster"}
Overrides = dict[str, dict[str, Any]]
#: returns its exit code, None = 0
Command = Callable[..., int | None]


def with_config_flags(tables: Sequence[str] = _TABLES, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command that takes `overrides` one option per scalar key of `tables`; values of flags and variables arrive there.

    `without` are keys that have no meaning for this command.
    """
    scalars = [found for found in _scalars(tables) if found[1] not in without]
    return lambda command: _with_flags(command, scalars)


def _with_flags(command: Command, scalars: Sequence[tuple[str, str, type]]) -> Command:

    def wrapped(**arguments: Any) -> int | None:
        overrides: Overrides = {}
        for table, key, _ in scalars:
            value = arguments.pop(key)
            if value is not None:
                overrides.setdefault(table, {})[key] = value
        return command(**arguments, overrides=overrides)

    own = [parameter for parameter in inspect.signature(command, eval_str=True).parameters.values() if parameter.name != "overrides"]
    options = [_option(table, key, kind) for table, key, kind in scalars]
    wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _scalars(tables: Sequence[str]) -> Iterator[tuple[str, str, type]]:
    for table in tables:
        model = ServiceConfig.model_fields[table].annotation
        assert model is not None
        for key, field in model.model_fields.items():
            kind = _scalar_type(field.annotation)
            if kind is not None:
                yield table, key, kind


def _scalar_type(annotation: Any) -> type | None:
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        annotation = next((part for part in parts if get_origin(part) is Literal), parts[0])
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return str
    return annotation if annotation in (int, float, bool, str, Path) else None


def _option(table: str, key: str, kind: type) -> inspect.Parameter:
    name = _NAMES.get((table, key), key)
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        flag += f"/--no-{flag.removeprefix('--')}"
    option = typer.Option(
        flag, envvar=f"MOESERVE_{name.upper()}", help=f"{table}.{key}", show_default=False, rich_help_panel=rf"\[{table}]"
    )
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
