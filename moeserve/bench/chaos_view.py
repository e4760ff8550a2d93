"""The output of `moeserve chaos`: lines and a bar while it runs, then a table."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moeserve.bench.chaos_load import RIGHT, WRONG, LoadProcess

_SHOW_S: Final = 0.25
# A process that runs later than this waited for the machine.
_LATE_MS: Final = 50.0


@contextmanager
def progress(total_s: float) -> Iterator[tuple[Callable[[str], None], Callable[[LoadProcess], None]]]:
    """Yields what tells a line, and what shows the counts of a load from then on: both on stderr, the latter if that is a terminal."""
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    tasks: list[asyncio.Task[None]] = []
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:

        async def show(load: LoadProcess) -> None:
            task, begin = bar.add_task("", total=total_s), time.monotonic()
            while True:
                counts = load.outcomes
                failed = counts.total() - counts[RIGHT] - counts[WRONG]
                text = f"{counts.total():,} calls, {failed} failed, {counts[WRONG]} wrong"
                bar.update(task, completed=time.monotonic() - begin, description=text)
                await asyncio.sleep(_SHOW_S)

        try:
            yield console.print, lambda load: tasks.append(asyncio.create_task(show(load)))
        finally:
            for task in tasks:
                task.cancel()


def print_findings(found: dict[str, Any]) -> None:
    """One row per kind of fault, then what holds for all."""
    console = Console()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("fault", "times", "longest stall, ms"):
        table.add_column(name, justify="left" if name == "fault" else "right", no_wrap=True)
    for kind, times in found["faults"].items():
        stall_ms = found["longest_stall_ms"][kind]
        table.add_row(kind, str(times), "-" if stall_ms is None else f"{stall_ms:,.0f}")
    console.print(table)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for phase in found["tokens_per_s"]:
        table.add_column(phase, justify="right", no_wrap=True)
    table.add_row("tokens/s", *(f"{value:,.0f}" for value in found["tokens_per_s"].values()))
    table.add_row("p99, ms", *("-" if value is None else f"{value:,.1f}" for value in found["p99_ms"].values()))
    console.print(table)
    console.print(f"{found['sent']:,} sent, {found['answered']:,} answered, {found['failed']} failed, {found['wrong']} wrong")
    if found["errors"]:
        console.print("failed: " + ", ".join(f"{code} {count}" for code, count in found["errors"].items()))
    if found["longest_lag_ms"] > _LATE_MS:
        console.print(f"this machine was busy with something else for up to {found['longest_lag_ms']:,.0f} ms, so calls took longer")
    if not found["all_hosts_back"]:
        console.print("not every host is back")
