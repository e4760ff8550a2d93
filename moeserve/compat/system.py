"""A system whose configurations can be imported: its parameters, and which values do not fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeserve.compat.accepts import Values
from moeserve.compat.table import Param


@dataclass(frozen=True)
class Rule:
    """Values that do not fit each other: when, and the sentence that says so."""

    when: Callable[[Values], bool]
    sentence: Callable[[Values], str]


def at_most(smaller: str, larger: str, least: int = 1, when: Callable[[Values], bool] = lambda values: True) -> Rule:
    """The first parameter does not exceed the second."""
    return Rule(
        lambda values: when(values) and values[smaller] > values[larger],
        lambda values: f"{smaller} is {values[smaller]}; allowed: {least} to {larger} = {values[larger]}",
    )


def divides(part: str, total: str, when: Callable[[Values], bool] = lambda values: True) -> Rule:
    """The first parameter divides the second."""
    return Rule(
        lambda values: when(values) and values[total] % values[part] != 0,
        lambda values: f"{part} is {values[part]}; allowed: what divides {total} = {values[total]}",
    )


@dataclass(frozen=True)
class System:
    """A system whose configurations can be imported.

    params      every parameter, nested ones by dotted name
    base        keys of the service configuration that hold for every import from this system
    smallest    what must be given at least
    num_layers  how many layers of the one kind there are
    """

    name: str
    params: Sequence[Param]
    rules: Sequence[Rule]
    base: Mapping[str, Any]
    smallest: Mapping[str, Any]
    num_layers: Callable[[Values], int] = lambda values: 1
