"""What a pickle holds, without what it would run.

A pickle is a program of a stack machine, most of whose instructions push numbers, strings and containers; a few import something by its
name and call it (Python's Lib/pickletools.py documents all of them). This machine has the first kind only. A name stays a name, and what
would be called becomes a note of what and with what, so a file can name anything: nothing is imported, made or run.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

#: of a key that is compared by its value
_MAX_PARTS: Final = 32
_MAX_BITS: Final = 4096
#: of what is imported
_MAX_NAME: Final = 512


@dataclass(frozen=True, eq=False)
class Named:
    """Something that the pickle imports: "package.module.name"."""

    path: str


@dataclass(frozen=True, eq=False)
class Made:
    """An object that the pickle makes by calling `maker`. `items`: the entries that it sets in it, as in an OrderedDict."""

    maker: Any
    arguments: tuple[Any, ...]
    items: dict[Any, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """What makes it, as far as that is a name."""
        return self.maker.path if isinstance(self.maker, Named) else "an object"


@dataclass(frozen=True, eq=False)
class External:
    """Something that is kept outside of the pickle, and how that is found."""

    key: Any


def read_pickle(data: bytes) -> Any:
    """The object in `data`, any protocol up to 5: plain values as they are, others as Named, Made and External.

    Attributes of objects are left out. Raises ValueError when it is no pickle.
    """
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name == "STOP":
                return machine.pop()
            _INSTRUCTIONS[instruction.name](machine, argument)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"a broken pickle: {error}") from None
    raise AssertionError("the library sees to it that a pickle ends with STOP")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        values, self.stack = self.stack, self.outer.pop()
        return values

    def take(self, count: int) -> list[Any]:
        """The topmost `count` values, in the order in which they were pushed."""
        return [self.pop() for _ in range(count)][::-1]

    def make(self, maker: Any, *arguments: Any) -> None:
        self.push(Made(maker, arguments))

    def apply(self, arguments: Any) -> None:
        # Of anything else there would be a copy: a short file could make many of one long list.
        if not isinstance(arguments, tuple):
            raise TypeError("arguments that are not a tuple")
        self.push(Made(self.pop(), arguments))

    def extend(self, values: list[Any]) -> None:
        """Lists and sets of the file grow; what other objects take in is not looked at."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(_key, values))

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Made) else target
        if isinstance(items, dict):
            items.update(_entries(values))


_Step = Callable[[_Machine, Any], Any]

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: Mapping[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_SEQUENCES: Mapping[str, type] = {"TUPLE": tuple, "LIST": list}


def _constant(value: Any) -> _Step:
    return lambda machine, _: machine.push(value)


def _new(kind: type) -> _Step:
    return lambda machine, _: machine.push(kind())


def _sequence(kind: type) -> _Step:
    return lambda machine, _: machine.push(kind(machine.marked()))


def _frozen(machine: _Machine, _: Any) -> None:
    machine.push(frozenset(map(_key, machine.marked())))


def _tuple(count: int) -> _Step:
    return lambda machine, _: machine.push(tuple(machine.take(count)))


def _dict(machine: _Machine, _: Any) -> None:
    machine.push(dict(_entries(machine.marked())))


def _entries(values: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(map(_key, values[::2]), values[1::2], strict=True)


def _key(value: Any) -> Any:
    """`value` as a key of a dict or a member of a set.

    Python hashes a tuple part by part, however often: in each other they take more stack than there is, or have no end. Such a key counts
    as an object of its own.
    """
    parts = value if isinstance(value, tuple | frozenset) else (value,)
    is_simple = len(parts) <= _MAX_PARTS and not any(
        isinstance(part, tuple | frozenset) or (isinstance(part, int) and part.bit_length() > _MAX_BITS) for part in parts
    )
    return value if is_simple else Made(Named(type(value).__name__), (value,))


def _global(machine: _Machine, _: Any) -> None:
    names = machine.take(2)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a name that is not text")
    if sum(map(len, names)) > _MAX_NAME:
        raise ValueError(f"a name of more than {_MAX_NAME} characters")
    machine.push(Named(".".join(names)))


def _pop(machine: _Machine, _: Any) -> None:
    # As the library has it: without anything since the last mark, the mark is what goes.
    machine.pop() if machine.stack else machine.marked()


_INSTRUCTIONS: Mapping[str, _Step] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    **dict.fromkeys((*_NUMBERS, *_TEXTS, *_BYTES), lambda machine, value: machine.push(value)),
    **{name: _constant(value) for name, value in _CONSTANTS.items()},
    **{name: _new(kind) for name, kind in _EMPTY.items()},
    **{name: _sequence(kind) for name, kind in _SEQUENCES.items()},
    **{f"TUPLE{count}": _tuple(count) for count in (1, 2, 3)},
    "FROZENSET": _frozen,
    "DICT": _dict,
    "MARK": lambda machine, _: machine.mark(),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.marked(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.extend(machine.marked())),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[int(index)])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine.memo.update({int(index): machine.stack[-1]})),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    # What would import
    "GLOBAL": lambda machine, path: machine.push(Named(path.replace(" ", "."))),
    "STACK_GLOBAL": _global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda machine, code: machine.push(Named(f"extension {code}"))),
    # What would call
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.apply(machine.pop())),
    "NEWOBJ_EX": lambda machine, _: machine.make(*machine.take(3)),
    "OBJ": lambda machine, _: machine.make(*machine.marked()),
    "INST": lambda machine, path: machine.make(Named(path.replace(" ", ".")), *machine.marked()),
    "BUILD": lambda machine, _: machine.pop(),
    # What would be fetched
    "PERSID": lambda machine, key: machine.push(External(key)),
    "BINPERSID": lambda machine, _: machine.push(External(machine.pop())),
    "NEXT_BUFFER": lambda machine, _: machine.push(External(None)),
    "READONLY_BUFFER": lambda machine, _: None,
}
