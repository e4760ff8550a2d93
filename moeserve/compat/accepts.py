"""Which values a parameter of another system takes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: parameter -> value: those that were given, and the other system's defaults for the rest
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Accepts:
    """Which values a parameter takes: in words, as a test, and by at least two of them."""

    says: str
    test: Callable[[Any], bool]
    examples: Sequence[Any]


FLAG = Accepts("true or false", lambda value: isinstance(value, bool), (True, False))
TEXT = Accepts("a string", lambda value: isinstance(value, str), ("a", "b"))
ANYTHING = Accepts("anything", lambda value: True, ("anything", None))


def whole(minimum: int) -> Accepts:
    """Integers of at least `minimum`."""
    says = f"an integer of at least {minimum}"
    return Accepts(says, lambda value: type(value) is int and value >= minimum, (minimum + 1, minimum + 2))


def real(above: float = -math.inf, below: float = math.inf, minimum: float = -math.inf, maximum: float = math.inf) -> Accepts:
    """Finite numbers within the bounds, of which `above` and `below` are outside."""
    bounds = [(above, "above"), (below, "below"), (minimum, "of at least"), (maximum, "of at most")]
    said = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound))

    def test(value: Any) -> bool:
        is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        return is_number and above < value < below and minimum <= value <= maximum

    return Accepts(f"a number {said}".rstrip(), test, (0.5, 0.25))


def one_of(*values: Any) -> Accepts:
    """These values and no others; 1 is not true."""
    said = ", ".join(shown(value) for value in values)
    return Accepts(said, lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values), values)


def variant_of(enum: type[StrEnum]) -> Accepts:
    """A variant itself, or its name."""
    names = [variant.value for variant in enum]
    return Accepts(", ".join(names), lambda value: isinstance(value, str) and value in names, names)


def optional(accepts: Accepts) -> Accepts:
    """Null, or what `accepts` takes."""
    return Accepts(f"null, or {accepts.says}", lambda value: value is None or accepts.test(value), accepts.examples)


def shown(value: Any) -> str:
    """A value as the tables write it: text in quotes, variants of an enum by their names."""
    if isinstance(value, StrEnum):
        return str(value)
    return repr(value) if isinstance(value, str) else json.dumps(value)
