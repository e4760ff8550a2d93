"""Loads: which experts callers ask for, by a law of chance or as recorded.

E experts of a layer that live on hosts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from moeserve.bench.trace import Rows, Trace, TraceLine, read_trace
from moeserve.config import LayerSpec
from moeserve.errors import ConfigError, number_of

_LAWS: Final = ("zipf", "lognormal")
_MOST: Final = 20.0
#: so many that a row more or less does not matter
_ROWS_OF_AN_EXPERT: Final = 1e6


def load_of(text: str, specs: Sequence[LayerSpec], seed: int) -> Sequence[TraceLine]:
    """The load that --load names. Raises ConfigError."""
    law, colon, number = text.partition(":")
    if colon and law in _LAWS:
        return [TraceLine(1.0, _drawn(law, _parameter(text, number), specs, np.random.default_rng(seed)))]
    if not os.path.isfile(text):
        raise ConfigError(f"--load is {text!r}; allowed: zipf:S, lognormal:S, or a file that `moeserve bench --record` has written")
    return read_load(Path(text), specs)


def read_load(path: Path, specs: Sequence[LayerSpec]) -> Sequence[TraceLine]:
    """A recorded one, of these layers. Raises ConfigError."""
    trace = read_trace(path)
    _check_layers(path, trace, specs)
    # A gate counts experts that do not compute, too: they come last, and live nowhere.
    return [
        TraceLine(line.at_s, [rows[: spec.num_hosted_experts] for rows, spec in zip(line.rows, specs, strict=True)]) for line in trace.lines
    ]


def _parameter(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MOST:
        raise ConfigError(f"--load is {text!r}; allowed after the colon: a number from 0 to {_MOST:g}")
    return value


def _drawn(law: str, parameter: float, specs: Sequence[LayerSpec], drawn: np.random.Generator) -> list[Rows]:
    """Rows of each layer, another order of experts in each. zipf: the i-th most wanted is asked i^-S as often as the first.

    lognormal: e to the power of normally distributed numbers of standard deviation S.
    """
    rows = []
    for spec in specs:
        ranks = np.arange(1, spec.num_hosted_experts + 1, dtype=np.float64)
        weights = drawn.permutation(ranks**-parameter) if law == "zipf" else np.exp(parameter * drawn.standard_normal(len(ranks)))
        rows.append(_ROWS_OF_AN_EXPERT * len(ranks) * possible(weights / weights.sum(), spec.gating.top_k))
    return rows


def possible(shares: Rows, top_k: int) -> Rows:
    """[E]: shares of the rows, none above 1 / top_k, because a token asks an expert once at most; what is above goes to the others."""
    most = 1 / min(top_k, len(shares))
    is_full = np.zeros(len(shares), dtype=bool)
    while (is_over := (shares > most * (1 + 1e-9)) & ~is_full).any():
        is_full |= is_over
        rest = 1 - most * is_full.sum()
        others = shares[~is_full].sum()
        shares = np.where(is_full, most, shares * (rest / others if others > 0 else 0.0))
    return shares


def _check_layers(path: Path, trace: Trace, specs: Sequence[LayerSpec]) -> None:
    found, expected = list(trace.layers.items()), [(spec.name, spec.num_experts) for spec in specs]
    if [number for _, number in found] != [number for _, number in expected]:
        raise ConfigError(f"{path} has {_told(found)}; the layers to be simulated are {_told(expected)}")


def _told(layers: Sequence[tuple[str, int]]) -> str:
    numbers = sorted({number for _, number in layers})
    of_each = number_of(numbers[0], "expert") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} experts"
    return f"{number_of(len(layers), 'layer')} of {of_each}"
