"""A recorded demand: what callers asked of every expert, second by second; `moeserve bench --record` writes, `moeserve simulate` plays it.

One JSON object a line. The first: {"layers": {name: experts, ...}}. Every other: {"at_s": seconds since the start, "rows": [[rows of each
expert, since the line before], of each layer]}.

E experts of a layer, as its gate counts them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moeserve.config import MAX_EXPERTS, MAX_LAYERS
from moeserve.errors import ConfigError
from moeserve.files import read_file

_MAX_BYTES: Final = 2**30

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TraceLine:
    """Rows [E] of each layer that were asked for, since the line before, until `at_s`, in seconds since the start."""

    at_s: float
    rows: Sequence[Rows]


@dataclass(frozen=True, eq=False)
class Trace:
    """`layers`: the number of experts E of each, by name; lines in the order of their times, one at least."""

    layers: Mapping[str, int]
    lines: Sequence[TraceLine]


def read_trace(path: Path) -> Trace:
    """Raises ConfigError naming the file, the line and what is allowed."""
    try:
        texts = read_file(path, _MAX_BYTES).decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} is not a readable trace: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a readable trace: {error}") from None
    if len(texts) < 2:
        raise ConfigError(f"{path} is no trace: expected a line that names the layers, and one line at least of rows")
    layers = _layers(path, _object(path, 1, texts[0]))
    lines = [TraceLine(0.0, ())]
    for number, text in enumerate(texts[1:], 2):
        lines.append(_line(f"{path}, line {number}", _object(path, number, text), layers, lines[-1].at_s))
    return Trace(layers, lines[1:])


def _object(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}, line {number} is no JSON object, as every line of a trace is")
    return found


def _layers(path: Path, head: Mapping[str, Any]) -> dict[str, int]:
    layers = head.get("layers")
    if not isinstance(layers, dict) or not 0 < len(layers) <= MAX_LAYERS or any(type(number) is not int for number in layers.values()):
        raise ConfigError(f'{path}, line 1: expected {{"layers": {{NAME: number of experts, ...}}}}')
    if wrong := [name for name, number in layers.items() if not 0 < number <= MAX_EXPERTS]:
        raise ConfigError(f"{path}, line 1: layer {wrong[0]!r} has {layers[wrong[0]]} experts; allowed: 1..{MAX_EXPERTS}")
    return layers


def _line(where: str, found: Mapping[str, Any], layers: Mapping[str, int], after_s: float) -> TraceLine:
    at_s, rows = found.get("at_s"), found.get("rows")
    if not isinstance(at_s, int | float) or isinstance(at_s, bool) or not after_s < at_s < 2**53:
        raise ConfigError(f"{where}: at_s is {at_s!r:.80}; allowed: a number of seconds above {after_s:g}, the one before, up to 2^53")
    if not isinstance(rows, list) or len(rows) != len(layers):
        raise ConfigError(f"{where}: expected rows of {len(layers)} layers")
    return TraceLine(at_s, [_counts(where, each, name, number) for each, (name, number) in zip(rows, layers.items(), strict=True)])


def _counts(where: str, rows: Any, name: str, num_experts: int) -> Rows:
    if not isinstance(rows, list) or len(rows) != num_experts:
        raise ConfigError(f"{where}: expected {num_experts} numbers of rows of layer {name}")
    if wrong := [each for each in rows if type(each) not in (int, float) or not 0 <= each < 2**53]:
        raise ConfigError(f"{where}: {wrong[0]!r} rows of layer {name}; allowed: numbers from 0 to 2^53")
    return np.array(rows, dtype=np.float64)
