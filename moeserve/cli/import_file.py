"""Another system's configuration file -> a mapping; the converted configuration -> TOML."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import tomli_w
import yaml

from moeserve.compat import ImportedConfig
from moeserve.errors import ConfigError
from moeserve.files import read_file

_MAX_BYTES: Final = 2**24


class _Yaml(yaml.SafeLoader):
    """What is merged into a mapping ("<<") is there once, as in what it becomes: else it doubles with each that has another twice."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        last = {(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}
        node.value = list(last.values())


def _read_yaml(text: str) -> Any:
    return _Yaml(text).get_single_data()


_READERS: Mapping[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}


def read_mapping(path: Path) -> Any:
    """The content of the file. Raises ConfigError when it cannot be read, or its suffix is not one of .json, .toml, .yaml and .yml."""
    if path.suffix not in _READERS:
        raise ConfigError(f"{path} is of an unknown kind; allowed suffixes: {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix](read_file(path, _MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError(f"{path} is not a readable {path.suffix[1:].upper()} file: {reason}") from None


def to_toml(imported: ImportedConfig, system: str, source: Path) -> str:
    """The keys that were set, under a comment per note."""
    notes = [f"# {note.field}: {note.what}" for note in imported.notes]
    name = source.name if source.name.isprintable() else repr(source.name)  # a comment is one line of text
    # None = unset; TOML has no null, so the key is left out.
    tables = imported.config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return "\n".join(
        [f"# imported from {name} ({system})", *notes, "", tomli_w.dumps({name: table for name, table in tables.items() if table})]
    )
