"""What `moeserve top` shows: a snapshot, and the difference to the one before.

E experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeserve.cli.columns import add_columns, cells, ratio_text, span_text
from moeserve.observe.records import columns
from moeserve.observe.stats import HostStats, LayerStats, ServiceStats
from moeserve.observe.summary import added, balancedness, counts_on, demand, forwards, host_shares, quantile_ms, since

#: eighths of four times an expert's fair share; height shows load where there is no color
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_COLOURS: Final = ("#46566b", "#4a6f9c", "#4f8ac9", "#5aa7d6", "#7cc0b4", "#c9c26b", "#e8a94d", "#ec7f45", "#e0493e")
_HOTTEST: Final = 3
_MAX_EVENTS: Final = 5
#: columns of a terminal from which on there is room for more
_WIDE: Final = 100
#: lines that are neither hosts nor layers
_FRAME_LINES: Final = 21


def view(target: str, stats: ServiceStats, before: ServiceStats | None, width: int, height: int | None = None) -> RenderableType:
    """`before` None, or of another service or frontend = rates since the start. `height` None = no limit; else not all layers may fit."""
    if before is not None and not counts_on(stats, before):
        before = None
    rows = len(stats.layers)
    if height is not None:
        rows = max(1, min(rows, (height - _FRAME_LINES - len(stats.hosts)) // 2))
    parts: list[RenderableType] = [
        _headline(target, stats, before),
        Text(),
        _hosts(stats, before, width),
        Text(),
        _layers(stats, before, rows, width),
        Text(),
    ]
    parts += _heat(stats.layers[:rows], width)
    if rows < len(stats.layers):
        parts.append(Text(f"and {len(stats.layers) - rows} more layers: --once shows all", style="dim"))
    if stats.events:
        parts += [Text(), _events(stats)]
    return Group(*parts)


def _headline(target: str, stats: ServiceStats, before: ServiceStats | None) -> Text:
    seconds = max(1e-9, stats.uptime_s - (before.uptime_s if before else 0.0))
    calls = added(since(forwards(stats), forwards(before) if before else []), "forwards")
    tokens = sum(layer.tokens for layer in stats.layers) - (sum(layer.tokens for layer in before.layers) if before else 0)
    failed = sum(call.count for call in stats.calls if call.code != "OK")
    first = f"moeserve {target}   up {_span(stats.uptime_s)}   placement {stats.epoch}   queue {stats.queue_tokens:,} tokens"
    changing = (f"\nchanging: {stats.changing}", "bold cyan") if stats.changing else ""
    numbers = [
        f"{tokens / seconds:,.0f} tokens/s",
        f"{sum(calls.counts) / seconds:,.1f} requests/s",
        f"p50 {_ms(quantile_ms(calls, 0.5))}",
        f"p99 {_ms(quantile_ms(calls, 0.99))}",
    ]
    period = f"in the last {seconds:.1f} s" if before else "since the start"
    counted = [(failed, "failed"), *((getattr(stats, column.key), column.label) for column in columns(ServiceStats))]
    failures = ("".join(f"   {count:,} {what}" for count, what in counted if count), "yellow")
    return Text.assemble((first, "bold"), failures, "\n", "   ".join(numbers), (f"   {period}", "dim"), changing)


def _hosts(stats: ServiceStats, before: ServiceStats | None, width: int) -> Table:
    table = _table(width, "host", "")
    add_columns(table, HostStats, no_wrap=True)
    is_wide = width >= _WIDE
    for name in (*(("load",) if is_wide else ()), "held"):
        table.add_column(name, justify="right", no_wrap=True)
    shares = host_shares(stats.layers, _asked(stats, before)) if is_wide else {}
    experts: Counter[int] = Counter()
    for layer in stats.layers:
        for held in layer.placement:
            experts[held.host] += len(held.experts)
    for host in stats.hosts:
        state = Text("up", style="green") if host.up else Text("DOWN", style="bold red")
        load = (f"{shares.get(host.number, 0.0):.0%}",) if is_wide else ()
        table.add_row(host.name, state, *cells(host, width // 5), *load, str(experts[host.number]))
    return table


def _asked(stats: ServiceStats, before: ServiceStats | None) -> list[list[int]]:
    """[E] of each layer: what was asked of the experts between the two snapshots; if nothing, since the start."""
    now = [demand(layer) for layer in stats.layers]
    if before is None:
        return now
    gained = [[new - old for new, old in zip(*both, strict=True)] for both in zip(now, map(demand, before.layers), strict=True)]
    return gained if any(map(any, gained)) else now


def _layers(stats: ServiceStats, before: ServiceStats | None, rows: int, width: int) -> Table:
    table = _table(width, "", "layer")
    add_columns(table, LayerStats, no_wrap=True)
    for name in ("tokens/s", "dropped", "balance", "hosts", "copies"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("hottest experts", no_wrap=True)
    seconds = max(1e-9, stats.uptime_s - (before.uptime_s if before else 0.0))
    for index, layer in enumerate(stats.layers[:rows]):
        wanted = demand(layer)
        gained = layer.tokens - (before.layers[index].tokens if before else 0)
        dropped = sum(layer.dropped_by_expert) / max(1, sum(wanted))
        table.add_row(
            str(index),
            layer.name,
            *cells(layer, width),
            f"{gained / seconds:,.0f}",
            Text(f"{dropped:.1%}", style="yellow" if dropped else ""),
            f"{balancedness(wanted):.2f}",
            ratio_text(layer.host_balancedness),
            span_text(layer.live_copies),
            _hottest(wanted),
        )
    return table


def _heat(layers: Sequence[LayerStats], width: int) -> list[RenderableType]:
    """One line of blocks per layer: one per expert or, if there are many, the hottest of several neighbors."""
    most = max((len(layer.processed_by_expert) for layer in layers), default=0)
    label = len(str(max(0, len(layers) - 1))) + 1
    room = max(1, width - label)
    per_cell = math.ceil(most / room)
    wide = max(1, min(3, room // max(1, most)))
    scale = Text.assemble(
        ("load of each expert: ", "bold"),
        *(_block(level, 1) for level in range(len(_BLOCKS))),
        (" none … 4 times its share or more", "dim"),
    )
    if per_cell > 1:
        scale.append(f"; hottest of {per_cell} per block", style="dim")
    lines: list[RenderableType] = [scale]
    for index, layer in enumerate(layers):
        wanted = demand(layer)
        fair = sum(wanted) / max(1, len(wanted))
        hottest = [max(wanted[first : first + per_cell]) for first in range(0, len(wanted), per_cell)]
        levels = [_level(value / fair) if fair else 0 for value in hottest]
        lines.append(Text.assemble((f"{index:>{label - 1}} ", "dim"), *(_block(level, wide) for level in levels)))
    return lines


def _level(share: float) -> int:
    """share 1 = an equal share of the load; level 0 only for an expert that received no rows."""
    return min(len(_BLOCKS) - 1, math.ceil(share / 4 * (len(_BLOCKS) - 1)))


def _block(level: int, wide: int) -> tuple[str, str]:
    return ("·" if level == 0 else _BLOCKS[level]) * wide, _COLOURS[level]


def _events(stats: ServiceStats) -> Table:
    table = Table.grid(padding=(0, 2))
    for event in reversed(stats.events[-_MAX_EVENTS:]):
        when = time.strftime("%H:%M:%S", time.localtime(event.time_unix_s))
        often = f"{event.count:,} times" if event.count > 1 else ""
        table.add_row(Text(when, style="dim"), event.kind.replace("_", " "), event.subject, often)
    return table


def _table(width: int, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1 if width >= _WIDE else 0, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _hottest(wanted: Sequence[int]) -> str:
    """The experts with the largest shares of the layer's demand [E], and these shares."""
    total = sum(wanted)
    if not total:
        return "-"
    hottest = sorted(range(len(wanted)), key=wanted.__getitem__, reverse=True)[:_HOTTEST]
    return " ".join(f"{expert}:{wanted[expert] / total:.0%}" for expert in hottest)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _span(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
