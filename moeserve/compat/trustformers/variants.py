"""Rows of the tables for enum variants, and rules the structs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Literal

from moeserve.compat.table import Accepts, Case, Rule, Values


def variant_of(enum: type[StrEnum]) -> Accepts:
    """A variant itself, or its name."""
    names = [variant.value for variant in enum]
    return Accepts(", ".join(names), lambda value: isinstance(value, str) and value in names)


def variant(
    outcome: Literal["effect", "note", "refusal"],
    field: str,
    name: str,
    says: str,
    sets: Callable[[Values], Mapping[str, Any]] = lambda values: {},
) -> Case:
    """What one variant of the enum in `field` means."""
    return Case(outcome, says, name, name, lambda values: bool(values[field] == name), sets)


def at_most(smaller: str, larger: str) -> Rule:
    """The first parameter may not exceed the second."""
    return Rule(
        lambda values: values[smaller] > values[larger],
        lambda values: f"{smaller} is {values[smaller]}; allowed: 1 to {larger} = {values[larger]}",
    )
