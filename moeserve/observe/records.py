"""Records of what users see: one conversion to the wire and back, one to JSON, one description of table columns.

A record is a dataclass whose fields have the names of those of its protobuf message. A number is added where its record is, in the message
and where it is counted; clients, `--json`, `moeserve top` and the page follow.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from google.protobuf.message import Message

R = TypeVar("R")
M = TypeVar("M", bound="Message")

#: format of a column: a name that may be cut short, a text, a count, a running total, bytes, or a share of 1 that may not be known
Form = Literal["name", "text", "count", "total", "bytes", "share"]
_KEY: Final = "key"
_COLUMN: Final = "column"


@dataclass(frozen=True)
class Column:
    """A field that tables show, under this label; `is_public`: also on the page, which needs no token."""

    key: str
    label: str
    form: Form
    is_public: bool


def shown(label: str, form: Form, *, default: Any = MISSING, is_public: bool = False) -> Any:
    """A field of a record that tables show."""
    return field(default=default, metadata={_COLUMN: (label, form, is_public)})


def keyed(key: str) -> Any:
    """A field of a record that is called `key` on the wire and in JSON."""
    return field(metadata={_KEY: key})


@cache
def columns(kind: Any) -> Sequence[Column]:
    """What tables show of a record, in order."""
    return [Column(one.name, *one.metadata[_COLUMN]) for one in fields(kind) if _COLUMN in one.metadata]


def plain(record: Any) -> dict[str, Any]:
    """Field by field, what JSON can hold."""
    shape = _shape(record.__class__)
    found = dict(zip(shape.keys, shape.values(record), strict=True))
    for key in shape.lists:
        found[key] = list(found[key])
    for key in shape.records:
        found[key] = [plain(each) for each in found[key]]
    return found


def to_message(kind: type[M], record: Any) -> M:
    """The message that `read` makes the record of. A field that it does not have is an error."""
    found = plain(record)
    for one in kind.DESCRIPTOR.fields:
        if one.enum_type is not None:
            found[one.name] = f"{_prefix(one.enum_type)}{found[one.name].upper()}"
    return kind(**found)


def read(kind: type[R], message: Message) -> R:
    """The record of a message: an absent optional field is None, an enum's value its name in small letters."""
    made: Any = kind
    return made(**{name: reader(message) for name, reader in _readers(made)})  # type: ignore[no-any-return]


@cache
def _keys(kind: Any) -> Sequence[tuple[str, str]]:
    return [(one.name, one.metadata.get(_KEY, one.name)) for one in fields(kind)]


@dataclass(frozen=True)
class _Shape:
    """The keys of a kind of record and their getters, and the item types of its lists; computed once."""

    keys: Sequence[str]
    values: Callable[[Any], Sequence[Any]]
    lists: Sequence[str]
    records: Sequence[str]


@cache
def _shape(kind: Any) -> _Shape:
    hints, keys = get_type_hints(kind), _keys(kind)
    held = {key: get_args(hints[name])[0] for name, key in keys if get_origin(hints[name]) in (Sequence, tuple)}
    records = [key for key, of in held.items() if is_dataclass(of)]
    values = attrgetter(*(name for name, _ in keys))  # of one field it would be no sequence, but no record is so small
    return _Shape([key for _, key in keys], values, [key for key in held if key not in records], records)


@cache
def _readers(kind: Any) -> Sequence[tuple[str, Callable[[Any], Any]]]:
    hints = get_type_hints(kind)
    return [(name, _reader(key, hints[name])) for name, key in _keys(kind)]


def _reader(key: str, hint: Any) -> Callable[[Any], Any]:
    """Reads the field `key` of a message."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return lambda message: getattr(message, key) if message.HasField(key) else None
    if origin is None:
        return lambda message: _scalar(message, key)
    if is_dataclass(parts[0]):
        return lambda message: [read(parts[0], each) for each in getattr(message, key)]
    made = tuple if origin is tuple else list
    return lambda message: made(getattr(message, key))


def _scalar(message: Any, key: str) -> Any:
    value, enum = getattr(message, key), message.DESCRIPTOR.fields_by_name[key].enum_type
    if enum is None:
        return value
    known = enum.values_by_number.get(value)
    return str(value) if known is None else known.name.removeprefix(_prefix(enum)).lower()


def _prefix(enum: Any) -> str:
    """The common prefix of an enum's names: D_TYPE_ for D_TYPE_UNSPECIFIED."""
    first: str = enum.values[0].name
    return first.removesuffix("UNSPECIFIED")
