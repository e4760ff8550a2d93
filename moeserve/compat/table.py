"""What a table of another system's parameters is made of: one `Param` per parameter, one `Case` per thing its values can mean here.

    Param("k", whole(1), 1).means(
        effect(gate(top_k=1, renormalize="none"), "the raw probability is the weight", on=1),
        effect(gate(top_k=of("k"), renormalize="post_drop"), when=OTHERWISE),
    )

What a row says of its effect is written from what it sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moeserve.compat.accepts import Accepts, Values, shown

#: "nothing was said"; None is a value
UNSAID: Any = object()


@dataclass(frozen=True)
class Case:
    """One meaning of a parameter.

    effect   `sets` says which keys of the service configuration follow from the values
    note     it changes no answer here; `says` why. Reported when the parameter was given, or with `unasked` whenever `when` holds
    refusal  it is not supported here, and answers would differ without it; `says` why

    when     for which values it holds; `at` says the same in words
    example  a value of the parameter, and `beside` of others, that shows it
    """

    outcome: Literal["effect", "note", "refusal"]
    says: str
    example: Any
    at: str
    when: Callable[[Values], bool]
    sets: Callable[[Values], Mapping[str, Any]]
    beside: Mapping[str, Any]
    unasked: bool


@dataclass(frozen=True)
class When:
    """Values for which a case holds: in words, as a test, and by values of other parameters that make it so."""

    at: str
    test: Callable[[Values], bool]
    beside: Mapping[str, Any] = field(default_factory=dict)


def _none_before(values: Values) -> bool:
    raise AssertionError("the row knows the rows before it")


ALWAYS = When("any", lambda values: True)
#: none of the rows before holds
OTHERWISE = When("otherwise", _none_before)


def given(**values: Any) -> When:
    """Other parameters have these values."""
    said = " and ".join(name if value is True else f"{name} = {shown(value)}" for name, value in values.items())
    return When(f"with {said}", lambda actual: all(actual[name] == value for name, value in values.items()), values)


def shown_with(**values: Any) -> When:
    """Whatever other parameters are; these values of them show it."""
    return replace(ALWAYS, beside=values)


@dataclass(frozen=True)
class Param:
    """A parameter under the other system's name, which values it takes, its default there (or Required), and what it means here."""

    name: str
    accepts: Accepts
    default: Any
    cases: Sequence[Case] = ()

    def means(self, *rows: Row) -> Param:
        """With these cases, in this order."""
        param = self
        for row in rows:
            param = replace(param, cases=[*param.cases, row(param)])
        return param

    @property
    def example(self) -> Any:
        """A value that is not the default."""
        return next(value for value in self.accepts.examples if value != self.default)


#: a case of whichever parameter it is put under
Row = Callable[[Param], Case]


class Required:
    """The default of a parameter that has none."""


@dataclass(frozen=True)
class Computed:
    """A value of the service configuration that follows from the parameters; in words too, where key and row do not say it."""

    of: Callable[[Values], Any]
    says: str = ""


def of(name: str) -> Computed:
    """The value of another parameter."""
    return Computed(lambda values: values[name], name.rpartition(".")[2])


def gate(**keys: Any) -> dict[str, Any]:
    """Keys of [layers.gating]."""
    return {f"layers.gating.{key}": value for key, value in keys.items()}


def effect(sets: str | Mapping[str, Any], why: str = "", *, on: Any = UNSAID, when: When = ALWAYS, example: Any = UNSAID) -> Row:
    """Sets keys of the service configuration: one key, to the parameter's own value, or each key to a value or a Computed.

    on: the value of the parameter; when: what else must hold; example: a value that shows it, where neither `on` nor the default does.
    """

    def row(param: Param) -> Case:
        keys = {sets: Computed(of(param.name).of)} if isinstance(sets, str) else sets

        def values_of(values: Values) -> dict[str, Any]:
            return {key: value.of(values) if isinstance(value, Computed) else value for key, value in keys.items()}

        says = f"{_said(keys)}: {why}" if why else _said(keys)
        return replace(_case(param, on, when, example), outcome="effect", says=says, sets=values_of)

    return row


def note(why: str, *, on: Any = UNSAID, when: When = ALWAYS, example: Any = UNSAID) -> Row:
    """Changes no answer here."""
    return lambda param: replace(_case(param, on, when, example), says=why)


def assumed(why: str, when: When = ALWAYS) -> Row:
    """A note of what is assumed where the parameter is null, reported although nobody gave it."""

    def row(param: Param) -> Case:
        at = "not given" if when.at == ALWAYS.at else f"not given, {when.at}"
        return replace(_case(param, None, when, None), says=why, at=at, unasked=True)

    return row


def refusal(why: str, *, on: Any = UNSAID, when: When = ALWAYS, example: Any = UNSAID) -> Row:
    """Is not supported here, and answers would differ without it."""
    return lambda param: replace(_case(param, on, when, example), outcome="refusal", says=why)


def same(name: str, accepts: Accepts, default: Any, key: str, why: str = "") -> Param:
    """A parameter that has a key of its own here."""
    return Param(name, accepts, default).means(effect(key, why))


def notes(why: str, *params: Param) -> list[Param]:
    """Parameters that change no answer here, whatever their values."""
    return [param.means(note(why)) for param in params]


def _case(param: Param, on: Any, when: When, example: Any) -> Case:
    def holds(values: Values) -> bool:
        if when.test is _none_before:
            return not any(case.when(values) for case in param.cases)
        return (on is UNSAID or bool(values[param.name] == on)) and bool(when.test(values))

    if on is UNSAID:
        at = when.at
    else:
        at = shown(on) if when.at == ALWAYS.at else f"{shown(on)}, {when.at}"
    chosen = next((value for value in (example, on) if value is not UNSAID), param.example)
    return Case("note", "", chosen, at, holds, lambda values: {}, when.beside, unasked=False)


def _said(keys: Mapping[str, Any]) -> str:
    """`table.key` = value for the first key of a table; the others without the name of the table."""
    parts, before = [], ""
    for dotted, value in keys.items():
        table, _, key = dotted.rpartition(".")
        parts.append(f"`{key if table == before else dotted}`{_said_of(key, value)}")
        before = table
    return ", ".join(parts)


def _said_of(key: str, value: Any) -> str:
    if isinstance(value, Computed):
        return f" = {value.says}" if value.says not in ("", key) else ""
    if value is None:
        return " unset"
    return f" = `{value}`" if isinstance(value, str) else f" = {shown(value)}"
