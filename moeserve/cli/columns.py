"""The columns of records as tables on a terminal: see `moeserve.observe.records`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from moeserve.observe.records import Column, Form, columns

#: of a line that goes to a file or to another program: no table is so wide, so nothing is folded or cut
WHOLE: Final = 1000


def console(piped_width: int = 80) -> Console:
    """For results, in lines of `piped_width` where that is no terminal and COLUMNS says nothing.

    Text is shown as it is: the name of a layer or a frontend may look like rich's markup.
    """
    made = Console(markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = piped_width
    return made


def bytes_text(value: int) -> str:
    """With its unit."""
    mib = value / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def ratio_text(value: float | None) -> str:
    """A number between 0 and 1; - = not known."""
    return "-" if value is None else f"{value:.2f}"


def span_text(values: Sequence[int]) -> str:
    """The least and the most, or the number that all are."""
    least, most = min(values, default=0), max(values, default=0)
    return str(least) if least == most else f"{least}-{most}"


def _share_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


_number: Final = "{:,}".format
_TEXT: Final[Mapping[Form, Callable[[Any], str]]] = {
    "name": str,
    "text": str,
    "count": _number,
    "total": _number,
    "bytes": bytes_text,
    "share": _share_text,
}


def add_columns(table: Table, kind: type, **options: Any) -> None:
    """Adds the columns of a kind of record; `options` are rich's, for each column."""
    for column in columns(kind):
        is_text = column.form in ("name", "text")
        table.add_column(column.label, **{"justify": "left" if is_text else "right", "no_wrap": not is_text, **options})


def cells(record: Any, name_chars: int) -> list[str]:
    """The cells of one record; names are cut to so many characters."""
    return [_cell(column, getattr(record, column.key), name_chars) for column in columns(record.__class__)]


def _cell(column: Column, value: Any, name_chars: int) -> str:
    text = _TEXT[column.form](value)
    return text if column.form != "name" or len(text) <= name_chars else text[: name_chars - 1] + "…"
