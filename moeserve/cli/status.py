"""`moeserve status`: show hosts, frontends and layers of a service."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from moeserve.cli.columns import WHOLE, add_columns, cells, console, ratio_text, span_text
from moeserve.cli.target import AdminTokenFile, Target, TlsCa, admin_of
from moeserve.errors import number_of
from moeserve.observe.records import plain
from moeserve.observe.status import HostStatus, ServiceStatus

#: of a node's name, or of its id in Ray
_NODE_CHARS: Final = 12


def status(
    target: Target,
    admin_token_file: AdminTokenFile,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    tls_ca: TlsCa = None,
) -> None:
    """Show hosts, frontends and layers of a service: the desired state, the current state, and what is missing."""
    with admin_of(target, admin_token_file, tls_ca) as client:
        status = client.status()
    if as_json:
        print(json.dumps(plain(status)))
    else:
        _show(status, console(WHOLE))


def _show(status: ServiceStatus, console: Console) -> None:
    up = sum(host.is_up for host in status.hosts)
    changing = f", changing: {status.changing}" if status.is_changing else ""
    console.print(f"epoch {status.epoch}{changing}: {up} of {number_of(len(status.hosts), 'host')} up, {status.wanted_hosts} wanted")
    if status.shortage:
        console.print(Text(f"short: {status.shortage}", "yellow"), soft_wrap=True)
    console.print(_hosts(status))
    console.print(_frontends(status))
    console.print(_layers(status))


def _hosts(status: ServiceStatus) -> Table:
    table = _table("host", "state", "pid")
    add_columns(table, HostStatus, overflow="fold")
    table.add_column("experts", justify="right")
    experts: Counter[int] = Counter()
    for layer in status.layers:
        for held in layer.placement:
            experts[held.host] += len(held.experts)
    for host in status.hosts:
        state = Text("up", "green") if host.is_up else Text("down", "red")
        table.add_row(host.name, state, str(host.pid or ""), *cells(host, _NODE_CHARS), str(experts[host.number]))
    return table


def _frontends(status: ServiceStatus) -> Table:
    table = _table("frontend", "state", "gRPC", "metrics", "node", "epoch")
    for frontend in status.frontends:
        state = Text("ready", "green") if frontend.is_ready else Text("not ready", "red")
        table.add_row(frontend.name, state, frontend.target, frontend.metrics_target, frontend.node[:_NODE_CHARS], str(frontend.epoch))
    return table


def _layers(status: ServiceStatus) -> Table:
    table = _table("layer")
    for column in ("revision", "hosts", "shards per expert", "copies", "rows/s", "hottest", "balance of hosts"):
        table.add_column(column, justify="right")
    for layer in status.layers:
        rows_per_s = sum(layer.demand_rows_per_s)
        hottest = max(range(len(layer.demand_rows_per_s)), key=layer.demand_rows_per_s.__getitem__) if rows_per_s else None
        table.add_row(
            layer.name,
            str(layer.model_revision),
            str(len(layer.placement)),
            str(layer.tensor_parallel),
            span_text(layer.copies),
            f"{rows_per_s:,.0f}",
            "-" if hottest is None else f"{hottest}:{layer.demand_rows_per_s[hottest] / rows_per_s:.0%}",
            ratio_text(layer.host_balancedness),
        )
    return table


def _table(*columns: str) -> Table:
    """On a narrow terminal long cells wrap: a cut address is useless."""
    return Table(*(Column(column, overflow="fold") for column in columns), box=SIMPLE_HEAD)
