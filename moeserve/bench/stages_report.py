"""The output of `moeserve trace`: a table of stages for each number of tokens, or JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moeserve.bench.stages import APART, STAGES, TimedCall

_COLUMNS: Final = ("median_us", "p99_us", "mean_us", "floor_us")


def run_of(tokens: int, calls: Sequence[TimedCall], floors: Mapping[str, float | None]) -> dict[str, Any]:
    """One run as JSON: its stages in order, those that no call had left out, but for the last one, `whole`."""
    names = [name for name in STAGES if any(name in call.stages_s for call in calls)]
    rows = [_row(name, [call.stages_s.get(name, 0.0) for call in calls], _floor(name, floors)) for name in names]
    whole_s = None if any(row["floor_us"] is None for row in rows) else sum(row["floor_us"] for row in rows) / 1e6
    return {"tokens": tokens, "calls": len(calls), "stages": rows, "whole": _row("whole", [call.whole_s for call in calls], whole_s)}


def print_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """A table for each, microseconds."""
    console = Console()
    for run in runs:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=f"{run['tokens']} tokens, {run['calls']} calls, microseconds")
        table.title_justify = "left"
        table.add_column("stage", no_wrap=True)
        for column in _COLUMNS:
            table.add_column(column.removesuffix("_us"), justify="right", no_wrap=True)
        for row in run["stages"]:
            table.add_row(_called(row["stage"]), *(_shown(row[column]) for column in _COLUMNS))
        table.add_section()
        table.add_row("whole", *(_shown(run["whole"][column]) for column in _COLUMNS))
        console.print(table)


def _row(name: str, seconds: Sequence[float], floor_s: float | None) -> dict[str, Any]:
    ordered = sorted(seconds)
    found = statistics.median(ordered), ordered[-(-99 * len(ordered) // 100) - 1], statistics.fmean(ordered), floor_s
    return {"stage": name, **{key: None if value is None else round(value * 1e6, 1) for key, value in zip(_COLUMNS, found, strict=True)}}


def _floor(name: str, floors: Mapping[str, float | None]) -> float | None:
    if name not in APART:
        return floors.get(name, 0.0)
    parts = [floors[part] for part in APART[name]]
    return sum(part for part in parts if part is not None)


def _called(name: str) -> str:
    texts = {"decode": "decode + validate", "grpc_in": "gRPC in", "grpc_out": "gRPC out", "network": "network (in + out)"}
    texts |= {"wake_up": "host wake-up", "host_network": "host network (both ways)"}
    return texts.get(name, name.replace("_", " "))


def _shown(us: float | None) -> str:
    return "-" if us is None else f"{us:,.0f}" if abs(us) >= 10 else f"{us:.1f}"
