"""The output of `moeserve bench`: a progress bar while it runs, then a table or JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

# A request that left later than this waited for this machine, not for the service.
_LATE_MS = 50.0


@contextmanager
def progress_bar(num_runs: int) -> Iterator[Callable[[int, float], None]]:
    """Yields a function of the run's number and the fraction of it that is done; shows it on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("warm-up", total=num_runs)

        def show(run: int, done: float) -> None:
            progress.update(task, completed=run + done, description=f"run {run + 1} of {num_runs}")

        yield show


def print_json(result: dict[str, Any]) -> None:
    """On stdout."""
    print(json.dumps(result, indent=2))


def print_table(runs: Sequence[dict[str, Any]]) -> None:
    """One row per run, then the errors by code."""
    driven_by = "concurrency" if "concurrency" in runs[0] else "rate"
    header = {"concurrency": "at once", "rate": "rate/s"}[driven_by]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, caption="latencies in ms", caption_justify="right")
    for name in ("tokens", header, "reqs", "reqs/s", "tokens/s", "p50", "p90", "p99", "max", "drops", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            str(run["tokens_per_request"]),
            f"{run[driven_by]:g}",
            str(run["requests"]),
            f"{run['requests_per_s']:.1f}",
            f"{run['tokens_per_s']:,.0f}",
            *(_short(value) for value in run["latency_ms"].values()),
            f"{run['dropped_pairs'] / run['requested_pairs']:.1%}" if run["requested_pairs"] else "-",
            str(run["failed"]),
        )
    console = Console()
    console.print(table)
    errors: Counter[str] = sum((Counter(run["errors"]) for run in runs), Counter())
    if errors:
        console.print("failed: " + ", ".join(f"{code} {count}" for code, count in errors.most_common()))
    if any(run["send_lag_ms"] > _LATE_MS for run in runs):
        lag_ms = max(run["send_lag_ms"] for run in runs)
        console.print(f"this machine started requests up to {lag_ms:.0f} ms late; latencies count from their planned start")


def _short(ms: float | None) -> str:
    """Three digits."""
    if ms is None:
        return "-"
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
