"""Values of config.json by key, checked. Functions raise ValueError with one sentence: key, value, and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from moeserve.config import MAX_SIZE

Config = Mapping[str, Any]


class LastRead(Mapping[str, Any]):
    """config.json, and in `key` what was asked for last: what a failing function of a family could not work with."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.key = ""

    def __getitem__(self, key: str) -> Any:
        self.key = key
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def lookup(config: Config, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has(config: Config, key: str) -> bool:
    """Whether there is a dotted key, be its value null."""
    table, _, name = key.rpartition(".")
    inside = lookup(config, table) if table else config
    return isinstance(inside, Mapping) and name in inside


def shown(value: Any) -> str:
    """As config.json has it."""
    return json.dumps(value)


def must_be(config: Config, key: str, allowed: str) -> ValueError:
    """The sentence about a value that is not allowed, or is missing."""
    return ValueError(f"{key} must be {allowed}, but is {shown(lookup(config, key)) if has(config, key) else 'missing'}")


def is_whole(value: Any, at_least: int) -> bool:
    """Whether it is a whole number, not a bool, from `at_least` to the largest size there can be."""
    return type(value) is int and at_least <= value <= MAX_SIZE


def allowed_whole(value: Any, at_least: int, at_most: int = MAX_SIZE) -> str:
    """What `must_be` says of a whole number that is not allowed."""
    if type(value) is int and value > at_most:
        return f"at most {at_most}"
    return "a positive whole number" if at_least == 1 else f"a whole number of at least {at_least}"


def whole(config: Config, key: str, default: int | None = None, at_least: int = 1) -> int:
    """The whole number at a dotted key."""
    value = lookup(config, key) if has(config, key) else default
    if not is_whole(value, at_least):
        raise must_be(config, key, allowed_whole(value, at_least))
    return int(value)  # type: ignore[arg-type]


def number(config: Config, key: str, default: float, *, may_be_zero: bool = False) -> float:
    """The finite number at a dotted key: positive, or 0 where it may be."""
    value = lookup(config, key) if has(config, key) else default
    if type(value) not in (int, float) or not isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        raise must_be(config, key, "a number of at least 0" if may_be_zero else "a positive number")
    return float(value)


def table(config: Config, key: str) -> Config:
    """The table at a key."""
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise must_be(config, key, "a table")
    return value


def flag(config: Config, key: str, default: bool) -> bool:
    """The bool at a key."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise must_be(config, key, "true or false")
    return value


def one_of(config: Config, key: str, allowed: Sequence[str], default: str) -> str:
    """The text at a key, one of `allowed`."""
    value = config.get(key, default)
    if value not in allowed:
        raise must_be(config, key, f"one of {', '.join(allowed)}")
    return str(value)


def indexes(config: Config, key: str) -> list[int] | None:
    """Of layers; None where there is no such key, or null."""
    value = config.get(key)
    if value is not None and not (isinstance(value, list) and all(is_whole(index, 0) for index in value)):
        raise must_be(config, key, "a list of layer numbers")
    return value


def kinds(config: Config, key: str, allowed: Sequence[str]) -> list[str] | None:
    """One of every layer; None where there is no such key, or null."""
    value = config.get(key)
    count = config.get("num_hidden_layers")
    if value is not None and not (isinstance(value, list) and len(value) == count and all(kind in allowed for kind in value)):
        raise must_be(config, key, f"a list of {' or '.join(allowed)} for each of the {count} layers")
    return value
