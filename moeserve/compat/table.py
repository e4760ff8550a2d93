"""What a table of another system's parameters is made of: one `Param` per parameter, one `Case` per thing its values can mean here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: parameter -> value: those that were given, and the other system's defaults for the rest
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Accepts:
    """Which values a parameter takes: in words, and as a test."""

    says: str
    test: Callable[[Any], bool]


FLAG = Accepts("true or false", lambda value: isinstance(value, bool))
TEXT = Accepts("a string", lambda value: isinstance(value, str))
ANYTHING = Accepts("anything", lambda value: True)


def whole(minimum: int) -> Accepts:
    """Integers of at least `minimum`."""
    return Accepts(f"an integer of at least {minimum}", lambda value: type(value) is int and value >= minimum)


def real(above: float = -math.inf, below: float = math.inf, minimum: float = -math.inf, maximum: float = math.inf) -> Accepts:
    """Finite numbers within the bounds, of which `above` and `below` are outside."""
    bounds = [(above, "above"), (below, "below"), (minimum, "of at least"), (maximum, "of at most")]
    said = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound))

    def test(value: Any) -> bool:
        is_number = type(value) in (int, float) and math.isfinite(value)
        return is_number and above < value < below and minimum <= value <= maximum

    return Accepts(f"a number {said}".rstrip(), test)


def one_of(*values: Any) -> Accepts:
    """These values and no others; 1 is not true."""
    said = ", ".join("null" if value is None else repr(value) for value in values)
    return Accepts(said, lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values))


def optional(accepts: Accepts) -> Accepts:
    """Null, or what `accepts` takes."""
    return Accepts(f"null, or {accepts.says}", lambda value: value is None or accepts.test(value))


@dataclass(frozen=True)
class Case:
    """One meaning of a parameter.

    effect   `sets` says which keys of the service configuration follow from the values
    note     it changes no answer here; `says` why. Reported when the parameter was given, or with `unasked` whenever `when` holds
    refusal  it cannot be had here, and leaving it out would change answers; `says` why

    when     for which values it holds; `at` says the same in words
    example  a value of the parameter, and `beside` of others, that shows it
    """

    outcome: Literal["effect", "note", "refusal"]
    says: str
    example: Any
    at: str = "any"
    when: Callable[[Values], bool] = lambda values: True
    sets: Callable[[Values], Mapping[str, Any]] = lambda values: {}
    beside: Mapping[str, Any] = field(default_factory=dict)
    unasked: bool = False


class Required:
    """The default of a parameter that has none."""


@dataclass(frozen=True)
class Param:
    """A parameter under the other system's name, which values it takes, its default there, and what it means here."""

    name: str
    accepts: Accepts
    default: Any
    cases: Sequence[Case]


@dataclass(frozen=True)
class Rule:
    """Values that do not fit each other: when, and the sentence that says so."""

    when: Callable[[Values], bool]
    sentence: Callable[[Values], str]


@dataclass(frozen=True)
class System:
    """A system whose configurations can be imported.

    params      every parameter, nested ones by dotted name
    base        keys of the service configuration that hold for every import from this system
    smallest    what must be given at least
    source      where the parameters were read
    num_layers  how many layers of the one kind there are
    """

    name: str
    source: str
    params: Sequence[Param]
    rules: Sequence[Rule]
    base: Mapping[str, Any]
    smallest: Mapping[str, Any]
    num_layers: Callable[[Values], int] = lambda values: 1


def sets(key: str, says: str, example: Any, name: str, **more: Any) -> Case:
    """The value of parameter `name` goes to `key` as it is."""
    return Case("effect", f"`{key}`{': ' + says if says else ''}", example, sets=lambda values: {key: values[name]}, **more)


def same(name: str, accepts: Accepts, default: Any, key: str, example: Any, says: str = "", **more: Any) -> Param:
    """A parameter that has a key of its own here."""
    return Param(name, accepts, default, [sets(key, says, example, name, **more)])


def noted(name: str, accepts: Accepts, default: Any, example: Any, why: str) -> Param:
    """A parameter that changes no answer here, whatever its value."""
    return Param(name, accepts, default, [Case("note", why, example)])
