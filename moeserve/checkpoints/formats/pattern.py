"""Regular expressions that a checkpoint brings along.

Python tries one way after the other to match them, and nothing else of the process runs meanwhile. There can be more ways than time:
(a+)+b doubles them with each a. So they are counted before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import comb
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Final

_MAX_LENGTH: Final = 2000
#: to match one name; they take a tenth of a second at most
_MAX_WAYS: Final = 4_000_000
_CHARACTERS: Final = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS: Final = ("MAX_REPEAT", "MIN_REPEAT")
#: `\d` and `[0-9]`
_DIGITS: Final = ("[(IN, [(CATEGORY, CATEGORY_DIGIT)])]", "[(IN, [(RANGE, (48, 57))])]")


class _UncountedError(Exception):
    """It may match in ways that grow faster than the name."""


#: C and P: of a name of N characters, C times as many as there are ways to cut P parts out of it
_Ways = tuple[int, int]


def required(pattern: str, where: str = "quantization_config") -> str:
    """`pattern`. Raises ValueError, which says `where` it stands, when it is none, or every name can match in too many ways."""
    _compiled(pattern, where)
    return pattern


def matches(pattern: str, name: str, where: str = "quantization_config") -> bool:
    """Whether `name` begins as `pattern` says. Raises ValueError, which says `where` it stands, as `required`, or if `name` is long."""
    compiled, count, parts = _compiled(pattern, where)
    if count * comb(len(name) + parts, parts) > _MAX_WAYS:
        raise _too_many(pattern, where)
    return compiled.match(name) is not None


def is_in(pattern: str, name: str) -> bool:
    """Whether a part of `name` is as `pattern` says; not, where it is none, or there are too many ways to look for it."""
    try:
        compiled, count, parts = _compiled(pattern, "")
    except ValueError:
        return False
    return count * comb(len(name) + parts + 1, parts + 1) <= _MAX_WAYS and compiled.search(name) is not None


def _too_many(pattern: str, where: str) -> ValueError:
    return ValueError(f"{where} has the pattern {pattern!r:.100}, which names can match in too many ways; allowed: fewer of * and +")


@lru_cache(maxsize=1024)
def _compiled(pattern: str, where: str) -> tuple[re.Pattern[str], int, int]:
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(f"{where} has a pattern of {len(pattern)} characters, {pattern!r:.50}...; allowed: up to {_MAX_LENGTH}")
    try:
        items = _parser.parse(pattern)
        # What comes last is tried once.
        return re.compile(pattern), *_in_sequence(items[:-1] if len(items) and _is_open(items[-1]) else items)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} has the pattern {pattern!r:.100}, which is none: {error}") from None
    except _UncountedError:
        raise _too_many(pattern, where) from None


def _is_open(item: tuple[Any, Any]) -> bool:
    """Whether it is one character, however often."""
    op, argument = str(item[0]), item[1]
    return op in _REPEATS and argument[1] > 1 and len(argument[2]) == 1 and str(argument[2][0][0]) in _CHARACTERS


def _in_sequence(items: Iterable[tuple[Any, Any]]) -> _Ways:
    count, parts = 1, 0
    in_turn: list[Any] = [*items, None]
    for item, after in pairwise(in_turn):
        # As many digits as there are before what is no digit: there is one way.
        if not (_is_open(item) and str(item[1][2]) in _DIGITS and after is not None and _is_no_digit(after)):
            more, further = _of_item(*item)
            count, parts = count * more, parts + further
    return count, parts


def _is_no_digit(item: tuple[Any, Any]) -> bool:
    return str(item[0]) == "LITERAL" and not chr(item[1]).isdecimal()


def _of_item(op: Any, argument: Any) -> _Ways:
    """Raises _UncountedError for what is not counted."""
    match str(op):
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT":
            return 1, 0
        case "SUBPATTERN":
            return _in_sequence(argument[-1])
        case "ASSERT" | "ASSERT_NOT":
            return _in_sequence(argument[1])
        case "BRANCH":
            return _of_branches(argument[1])
        case "MAX_REPEAT" | "MIN_REPEAT":
            return _repeated(*argument)
    raise _UncountedError


def _of_branches(branches: Sequence[Any]) -> _Ways:
    ways = [_in_sequence(branch) for branch in branches]
    texts = {tuple(chr(code).casefold() for _, code in branch) for branch in branches if all(str(op) == "LITERAL" for op, _ in branch)}
    # Of different texts, no two of a length can stand in one place, whatever the case.
    count = len({len(text) for text in texts}) if len(texts) == len(branches) else sum(count for count, _ in ways)
    return count, max(parts for _, parts in ways)


def _repeated(least: int, most: int, items: Any) -> _Ways:
    """Without an end, but each time in one way, which takes a character at least."""
    ways = count, parts = _in_sequence(items)
    if most <= 1:
        return count + 1, parts
    if ways != (1, 0) or not items.getwidth()[0]:
        raise _UncountedError
    return (1, 0) if least == most else (1, 1)
