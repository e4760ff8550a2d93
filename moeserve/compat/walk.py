"""Another system's parameters -> a service configuration, by walking that system's table."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moeserve.compat.accepts import Values
from moeserve.compat.system import System
from moeserve.compat.table import Required
from moeserve.config import GatingConfig, ServiceConfig, load_config
from moeserve.errors import ConfigError

#: of as much of a value as there is room for: what YAML says once may be there many times
_WORDS: Final = reprlib.Repr()
_WORDS.maxlevel, _WORDS.maxlist, _WORDS.maxdict, _WORDS.maxstring, _WORDS.maxlong, _WORDS.maxother = 3, 20, 20, 100, 100, 100
#: of an integer; every key of the service configuration allows less, but for a seed
_MOST_BITS: Final = 64


@dataclass(frozen=True)
class Note:
    """A parameter that was read and changes no answer here: its name, and why."""

    field: str
    what: str


@dataclass(frozen=True)
class ImportedConfig:
    """A complete service configuration, and what of the original it does not carry."""

    config: ServiceConfig
    notes: list[Note]


def walk(system: System, mapping: Mapping[str, Any]) -> ImportedConfig:
    """Reads `mapping` by the table of `system`. Raises ConfigError naming the parameter, its value and what is allowed."""
    given = _flat(system, mapping)
    values = complete(system, given)
    notes = []
    for param in system.params:
        for case in param.cases:
            if not case.when(values):
                continue
            if case.outcome == "refusal":
                raise ConfigError(f"{system.name}: {param.name} = {_shown(values[param.name])} is refused: {case.says}")
            if case.outcome == "note" and (case.unasked or param.name in given):
                notes.append(Note(param.name, case.says))
    keys = _nested(effects(system, values))
    seed = keys["layers"]["seed"]
    # Layers of one kind, not of one content.
    layers = [{**keys["layers"], "seed": seed + index} for index in range(system.num_layers(values))]
    return ImportedConfig(load_config({**keys, "layers": layers}), notes)


def complete(system: System, given: Mapping[str, Any]) -> Values:
    """The given parameters, checked, and the system's own defaults for the rest."""
    by_name = {param.name: param for param in system.params}
    for name, value in given.items():
        if name not in by_name:
            raise ConfigError(f"{system.name}: {_shown(name)} is not a parameter (got {_shown(value)}); allowed: {', '.join(by_name)}")
        if type(value) is int and value.bit_length() > _MOST_BITS:
            raise ConfigError(f"{system.name}: {name} is an integer of {value.bit_length()} bits; allowed: at most {_MOST_BITS}")
        if not by_name[name].accepts.test(value):
            raise ConfigError(f"{system.name}: {name} is {_shown(value)}; allowed: {by_name[name].accepts.says}")
    missing = [name for name, param in by_name.items() if param.default is Required and name not in given]
    if missing:
        raise ConfigError(f"{system.name}: {missing[0]} is required; allowed: {by_name[missing[0]].accepts.says}")
    values = {name: given.get(name, param.default) for name, param in by_name.items()}
    for rule in system.rules:
        if rule.when(values):
            raise ConfigError(f"{system.name}: {rule.sentence(values)}")
    return values


def effects(system: System, values: Values) -> dict[str, Any]:
    """Dotted key of the service configuration -> value."""
    keys = dict(system.base)
    for param in system.params:
        for case in param.cases:
            if case.outcome == "effect" and case.when(values):
                keys |= case.sets(values)
    return keys


def gating_of(system: System, given: Mapping[str, Any]) -> GatingConfig:
    """How a layer of the given parameters routes when it serves."""
    keys = effects(system, complete(system, given))
    return GatingConfig(**{key.removeprefix("layers.gating."): value for key, value in keys.items() if key.startswith("layers.gating.")})


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if getattr(config, each.name) != each.default}


def _flat(system: System, mapping: Any) -> dict[str, Any]:
    tables = {param.name.partition(".")[0] for param in system.params if "." in param.name}
    flat: dict[str, Any] = {}
    for name, value in _items(system.name, mapping).items():
        if name in tables:
            flat |= {f"{name}.{inner}": each for inner, each in _items(f"{system.name}: {name}", value).items()}
        else:
            flat[name] = value
    return flat


def _items(where: str, table: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(table) and not isinstance(table, type):
        return changed(table)
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {_shown(table)}; allowed: a mapping of parameters to values")
    return dict(table)


def _nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for dotted, value in keys.items():
        *tables, key = dotted.split(".")
        table = root
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return root


def _shown(value: Any) -> str:
    try:
        text = _WORDS.repr(value)
    except ValueError:
        text = "a number of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
