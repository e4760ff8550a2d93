"""TOML file, checkpoint folder or mapping -> ServiceConfig, with errors that name the full key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import ValidationError

from moeserve.config.cluster import RayConfig
from moeserve.config.server import ServerConfig
from moeserve.config.service import FrontendConfig, ServiceConfig
from moeserve.errors import ConfigError
from moeserve.files import read_file

_MAX_BYTES: Final = 2**24
_MAX_SHOWN: Final = 200
#: pydantic speaks of types of Python
_WORDS: Final = {
    "valid tuple": "list",
    "valid dictionary( or instance of \\w+)?": "table",
    "^Tuple should": "List should",
    " after validation": "",
    "Input is not a valid path for <class 'pathlib\\.Path'>": "Input should be a path",
}

Overrides = Mapping[str, Mapping[str, Any]]


def load_config(source: str | Path | Mapping[str, Any], overrides: Overrides | None = None) -> ServiceConfig:
    """The configuration of `source`: a TOML file, a checkpoint folder, or a mapping of the same shape as the TOML.

    `overrides` (table -> key -> value) win over the file. Relative paths in a file count from the file's folder,
    those in `overrides` from the working directory.
    Raises ConfigError naming the dotted key, the value and what is allowed.
    """
    where, data = _read(source)
    for table, values in _absolute_paths(overrides or {}, _working_directory).items():
        given = data.get(table, {})
        data[table] = {**given, **values} if isinstance(given, Mapping) else given
    try:
        return ServiceConfig.model_validate(data)
    except ValidationError as error:
        loc = error.errors()[0]["loc"]
        of_caller = len(loc) > 1 and loc[1] in (overrides or {}).get(str(loc[0]), {})
        raise ConfigError(f"{'flags or environment' if of_caller else where}: {_sentence(error, data)}") from None


def load_json(text: str) -> FrontendConfig:
    """The configuration that a controller has loaded and sent. Raises ConfigError."""
    try:
        return FrontendConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"the controller's configuration cannot be used: {_sentence(error)}") from None


def load_server(values: Mapping[str, Any]) -> ServerConfig:
    """The table [server] alone, for a process that receives the rest. Raises ConfigError."""
    try:
        return ServerConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"server: {_sentence(error, values)}") from None


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "configuration", _of_ray(source, "configuration")
    if source == "":  # to Python, it is the working directory
        raise ConfigError("the source is empty: give a TOML file or a checkpoint folder")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return str(path), {"model": {"checkpoint": (path if path.is_absolute() else _working_directory() / path).resolve()}}
    try:
        data = tomllib.loads(read_file(path, _MAX_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a TOML file or a checkpoint folder") from None
    except OSError as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from None
    return str(path), _absolute_paths(_of_ray(data, str(path)), lambda: path.resolve().parent)


def _of_ray(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """[cluster] may hold keys of [ray]: a copy with these in [ray]. Raises ConfigError when both hold the same key."""
    cluster, ray = data.get("cluster"), data.get("ray", {})
    if not isinstance(cluster, Mapping) or not isinstance(ray, Mapping):
        return dict(data)  # to be refused
    moved = {key: value for key, value in cluster.items() if key in RayConfig.model_fields}
    for key in moved.keys() & ray.keys():
        raise ConfigError(f"{where}: cluster.{key} and ray.{key} are the same key: give one of them")
    return {**data, "cluster": {key: value for key, value in cluster.items() if key not in moved}, "ray": {**ray, **moved}}


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working directory is gone: give absolute paths, or go to a folder that exists") from None


def _absolute_paths(data: Mapping[str, Any], folder: Callable[[], Path]) -> dict[str, Any]:
    """A copy in which paths count from `folder`; values of a wrong type stay, to be refused."""
    return {
        table: {key: _absolute(value, folder) if _is_path(table, key) else value for key, value in values.items()}
        if isinstance(values, Mapping)
        else values
        for table, values in data.items()
    }


def _is_path(table: str, key: str) -> bool:
    """The key is declared as a `File`."""
    field = _table_of(ServiceConfig.model_fields[table].annotation).get(key) if table in ServiceConfig.model_fields else None
    return field is not None and Path in _types_of(field.annotation)


def _types_of(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_of(part)


def _absolute(value: Any, folder: Callable[[], Path]) -> Any:
    if not isinstance(value, str | Path) or value == "":
        return value
    path = Path(os.path.expanduser(value))
    return path if path.is_absolute() else folder() / path


def _sentence(error: ValidationError, data: Any = None) -> str:
    errors = error.errors()
    keys = [_key(each["loc"], data) for each in errors]
    # Where several types are allowed, pydantic says what is wrong with each: the one that goes deepest into the value is meant.
    about_it = [key for key in keys if key[: len(keys[0])] == keys[0]]
    deepest = max(about_it, key=len)
    first, *others = [each for each, key in zip(errors, keys, strict=True) if key == deepest]
    key = ".".join(deepest)
    if first["type"] == "extra_forbidden":
        return f"{key} is not a key of the configuration (got {_shown(first['input'])}); allowed here: {_allowed(first['loc'])}"
    if first["type"] == "value_error":
        return _with_number(first["msg"].removeprefix("Value error, "), first["loc"])  # names its keys itself
    allowed = _in_words_of_toml(", or ".join([first["msg"], *(each["msg"].removeprefix("Input should be ") for each in others)]))
    more = f"; {len(keys) - len(about_it)} more" if len(keys) > len(about_it) else ""
    return f"{key}: {allowed} (got {_shown(first['input'])}){more}"


def _with_number(sentence: str, loc: tuple[int | str, ...]) -> str:
    """Keys of a layer know their table, and not which of several layers it is."""
    if len(loc) < 2 or loc[0] != "layers" or not isinstance(loc[1], int):
        return sentence
    sentence = re.sub(r"(?<![\w.'])gating\.", "layers.gating.", sentence)
    return re.sub(r"(?<![\w.'])layers\.(?=[a-z])", f"layers.{loc[1]}.", sentence)


def _in_words_of_toml(sentence: str) -> str:
    for python, toml in _WORDS.items():
        sentence = re.sub(python, toml, sentence)
    return sentence


def _key(loc: tuple[int | str, ...], data: Any) -> list[str]:
    """Without the names of the types that pydantic tried, such as "constrained-int" or "tuple[int, ...]", which no key of `data` is."""
    key = []
    for part in loc:
        held: Any = data if isinstance(data, Mapping) else dict(enumerate(data)) if isinstance(data, list | tuple) else {}
        if part in held:
            data = held[part]
        elif isinstance(part, str) and set(part) & set("-["):
            continue
        key.append(str(part) if str(part).isprintable() else repr(part))
    return key


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        text = "a number of too many digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _allowed(loc: tuple[int | str, ...]) -> str:
    fields: dict[str, Any] = {"server": None} | ServiceConfig.model_fields  # listed as in the documentation: [server] first
    for part in loc[:-1]:
        if isinstance(part, str) and part in fields:
            fields = _table_of(fields[part].annotation)
    return ", ".join(fields)


def _table_of(annotation: Any) -> dict[str, Any]:
    table = annotation.__args__[0] if hasattr(annotation, "__args__") else annotation
    return dict(getattr(table, "model_fields", {}))
